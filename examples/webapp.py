"""A web application that never waits for a host: it submits a job, and gets its result later by the job's id.

./dev run python examples/webapp.py --dispatcher localhost:3502 --port 8080   (the port that `./dev demo --keep` prints)

curl -X POST localhost:8080/disk-usage/localhost     {"job": "5f0c..."}
curl localhost:8080/jobs/5f0c...                     {"state": "done", "result": {...}}

The reply to the last request keeps three things apart: the job failed (200), there is no such job (404), and the
dispatcher could not be asked (503), so that the browser tries again later.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

import harp

#: A status of HTTP and the body of a reply.
Reply: TypeAlias = tuple[HTTPStatus, dict[str, Any]]


class Application(BaseHTTPRequestHandler):
    """Two pages: one submits a job, one reports on it. The application stores nothing; the dispatcher has every job."""

    dispatcher: harp.HarpCaller

    def do_POST(self) -> None:
        match self.path.strip("/").split("/"):
            case ["disk-usage", host]:
                # The queue runs one such job per host at a time, for any number of requests.
                server = self.dispatcher.host(host, queue={"disk-usage": host}, info={"from": "webapp"})
                self.answer(lambda: (HTTPStatus.ACCEPTED, {"job": server.disk_usage("/").id()}))
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def do_GET(self) -> None:
        match self.path.strip("/").split("/"):
            case ["jobs", job_id]:
                self.answer(lambda: report(self.dispatcher.job(job_id)))
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def answer(self, make_reply: Callable[[], Reply]) -> None:
        try:
            status, body = make_reply()
        except harp.CommunicationError as error:  # this is not an answer about a job
            status, body = HTTPStatus.SERVICE_UNAVAILABLE, {"error": f"cannot ask the dispatcher: {error}"}
        except harp.RemoteError as error:
            status, body = HTTPStatus.NOT_FOUND, {"error": str(error)}  # invalid_jobid: there is no such job
        except harp.HarpException as error:  # such as a name that is too long
            status, body = HTTPStatus.BAD_REQUEST, {"error": str(error)}
        self.send_response(status)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "5")
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode() + b"\n")


def report(job: harp.RemoteCall) -> Reply:
    """Return the state of a job, and its result or error, for the browser. Raise an error that is not the job's end."""
    match job.result():
        case harp.CALL_NOT_FINISHED:
            return HTTPStatus.OK, {"state": "waiting" if job.start_time() is None else "running"}
        case harp.CALL_CANCELLED:
            return HTTPStatus.OK, {"state": "cancelled"}
        case harp.CommunicationError() | harp.RemoteError(type="invalid_jobid") as error:
            raise error
        case harp.HarpException() as error:
            return HTTPStatus.OK, {"state": "failed", "error": str(error)}
        case result:
            return HTTPStatus.OK, {"state": "done", "result": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dispatcher", default="localhost:3502", help="HOST:PORT of harpcallerd")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    host, _, port = options.dispatcher.rpartition(":")
    Application.dispatcher = harp.HarpCaller(host, int(port), request_timeout=5)  # a browser waits for the reply
    with ThreadingHTTPServer(("127.0.0.1", options.port), Application) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
