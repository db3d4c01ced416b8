"""A stand-in for `shardwise serve` behind a keeper: `python -m tests.kept_server PARENT_PID serve …`. Starts at once.

With the model `refused` it refuses to.
"""

from __future__ import annotations

import http.server
import os
import signal
import sys

from launch.bound import bound

METRICS = """# HELP ours
vllm:num_requests_running{model_name="tiny"} 3.0
vllm:num_requests_waiting{model_name="tiny"} 2.0
vllm:kv_cache_usage_perc{model_name="tiny"} 0.25
vllm:generation_tokens_total{model_name="tiny"} %d.0
vllm:request_success_total{model_name="tiny",finished_reason="stop"} 4.0
vllm:request_success_total{model_name="tiny",finished_reason="length"} 1.0
shardwise:requests_refused_total{error="Overloaded"} 7.0
shardwise:requests_failed_total{error="GangDied"} 1.0
shardwise:replica_alive{replica="0"} 1.0
shardwise:replica_alive{replica="1"} 0.0
shardwise:replica_restarts_total{replica="1"} 2.0
shardwise:layout_info{devices="2",layout="dp2",model_name="tiny"} 1.0
"""


class Api(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        if self.path == "/metrics":
            Api.asked += 1
            self.wfile.write((METRICS % (1000 * Api.asked)).encode())
        else:
            self.wfile.write(b'{"model": "tiny", "reasons": ["It is the only one."]}')

    def log_message(self, *args: object) -> None:
        pass


def main(parent: int, argv: list[str]) -> None:
    bound(parent)
    if argv[1] == "refused":
        print("shardwise serve: no such model; give another", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        print("·   0.0 s  loading nothing", flush=True)
        print(f"·   0.1 s  serving {argv[1]} on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
