# The README's steps: docker build -t symmetric-rl . && docker run -v ./runs:/symmetric-rl/runs symmetric-rl
FROM python:3.13-slim
WORKDIR /symmetric-rl
# git: a run records the commit. EGL: MuJoCo's videos
RUN apt-get update && apt-get install -y --no-install-recommends git libegl1 && rm -rf /var/lib/apt/lists/*
COPY . .
RUN python3 -m venv .venv && .venv/bin/pip install -r requirements-control.txt
ENTRYPOINT [".venv/bin/python"]
CMD ["dsppo_continuous.py", "--env-id", "CartPole-v1", "--total-timesteps", "80_000"]
