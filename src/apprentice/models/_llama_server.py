"""llama.cpp's own HTTP server from the package xllamacpp, in a process of its own: a crash there is nobody else's.

Run as a script with one argument: {"model", "adapter", "port", "context", "parallel", "threads"} as JSON.
"""

from __future__ import annotations

import json
import signal
import sys

import xllamacpp


def main() -> None:
    """Serve until a signal ends it."""
    told = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = told["model"]
    params.hostnames = ["127.0.0.1"]
    params.port = told["port"]
    params.n_ctx = told["context"] * told["parallel"]  # shared out evenly to those asked at once
    params.n_parallel = told["parallel"]
    params.cpuparams.n_threads = told["threads"]
    params.cpuparams_batch.n_threads = told["threads"]
    params.n_threads_http = 64  # each open connection keeps one: with few, the next caller waits for a place
    params.ui = False
    if told["adapter"] is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(told["adapter"], 1.0)]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:  # what is wrong was written to the log before
        sys.exit(str(error))
    sys.stderr.write(f"listening at {server.listening_address}\n")
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
