"""The standard framework: ``socketserver``, a thread for each connection."""

import sys
from socketserver import StreamRequestHandler, ThreadingTCPServer


class UpperHandler(StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self) -> None:
        while line := self.rfile.readline():
            self.wfile.write(line.upper())


class UpperServer(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4096


with UpperServer(("127.0.0.1", int(sys.argv[1])), UpperHandler) as server:
    server.serve_forever()
