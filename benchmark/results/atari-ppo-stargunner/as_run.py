"""sppo_atari.py of commit bd27cf2 with three changes that save a fifth of the time and leave each weight as it is, bit for bit.

    python as_run.py --env-id StarGunner --noise bsc --alpha 1 --beta 0 --no-norm-adv --bf16 --num-threads 1 \\
        --eval-interval 250000 --seed 2 --exp-name ppo_raw

Put it beside that commit's sppo_atari.py. It is kept because these runs were made with it; sppo_atari.py now has the first of
the three. (1) Denormal numbers count as 0. (2) Minibatches are gathered as rows of memory. (3) With --bf16 the pixels are
divided by 255 in bfloat16, which is equal for all 256 of them.
"""

import signal
import sys

import torch
import torch.nn.functional as F

import sppo_atari as script

torch.set_flush_denormal(True)
plain_forward, plain_update = script.Agent.forward, script.update


def forward(self, obs):
    if not self.bf16:
        return plain_forward(self, obs)
    with torch.autocast(obs.device.type, torch.bfloat16):
        hidden = self.network(obs.to(torch.bfloat16).div_(255.0))
        logits, values = self.actor(hidden), self.critic(hidden)
    return F.log_softmax(logits.float(), -1), values.float().squeeze(-1)


class Rows:
    """Observations (batch, 4, 84, 84) in channels-last memory: obs[idx] copies whole rows."""

    def __init__(self, obs):
        self.rows = obs.permute(0, 2, 3, 1).reshape(len(obs), -1)
        self.device = obs.device

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, idx):
        return self.rows.index_select(0, idx).view(-1, 84, 84, 4).permute(0, 3, 1, 2)


def update(agent, optimizer, loss_fn, args, clip_coef, batch):
    return plain_update(agent, optimizer, loss_fn, args, clip_coef, [Rows(batch[0]), *batch[1:]])


script.Agent.forward, script.update = forward, update

if __name__ == "__main__":
    sys.argv[0] = "sppo_atari.py"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    args = script.parse_args(sys.argv[1:], script.Args())
    script.check_args(args)
    script.main(args)
