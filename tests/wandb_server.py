"""A stand-in for W&B's server: the part of its GraphQL that Workspace.save(), Api().runs() and Run.scan_history() use.

`with serve(runs) as server:` gives server.env (for WANDB_BASE_URL and WANDB_API_KEY) and server.views, what UpsertView2 sent.
runs: of the project rl, dictionaries with id, state, config, summary and, where it is asked for, history: rows.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def node(run):
    config = {name: {"value": value} for name, value in run["config"].items()}
    about = {"id": run["id"], "name": run["id"], "displayName": run["id"], "state": run["state"], "projectId": "1", "tags": []}
    about |= {"config": json.dumps(config), "summaryMetrics": json.dumps(run["summary"]), "systemMetrics": "{}"}
    about |= {"createdAt": "2026-01-01T00:00:00", "heartbeatAt": None, "historyLineCount": 0, "historyKeys": None}
    nothing = ("sweepName", "group", "jobType", "commit", "description", "notes")
    user = {"name": "me", "username": "me"}
    return about | dict.fromkeys(nothing) | {"readOnly": False, "user": user, "internalId": run["id"]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        asked = json.loads(body) if self.path == "/graphql" else {}
        query, answer = asked.get("query", ""), {}
        if "Viewer" in query or "DefaultEntity" in query:
            answer = {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        elif "UpsertView2" in query:
            self.server.views.append(asked["variables"])
            answer = {"upsertView": {"view": {"id": "1", "name": asked["variables"]["name"]}, "inserted": True}}
        elif any(name in query for name in ("RunHistoryKeys", "RunParquetHistory", "HistoryPage")):  # of Run.scan_history()
            about = asked["variables"]
            name = about.get("name") or about.get("runName") or about["run"]
            (rows,) = [run["history"] for run in self.server.runs if run["id"] == name]
            steps = range(len(rows))
            answer = {"historyKeys": {"lastStep": steps[-1], "keys": {}}}
            answer["parquetHistory"] = {"parquetUrls": [], "liveData": [{"_step": step} for step in steps]}
            page = steps[about.get("minStep", 0) : about.get("maxStep")]
            answer = {"project": {"run": answer | {"history": [json.dumps({**rows[step], "_step": step}) for step in page]}}}
        elif "Runs(" in query and asked["variables"]["project"] == "rl":  # {} of any other project, as there is none
            edges = [{"node": node(run), "cursor": run["id"]} for run in self.server.runs]
            page = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
            answer = {"project": {"internalId": "1", "runCount": len(edges), "readOnly": False, "runs": page}}
        data = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serve(runs=()):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.runs, server.views = runs, []
    server.env = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "a" * 40}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
