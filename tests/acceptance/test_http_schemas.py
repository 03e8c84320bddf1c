"""Every operation of the HTTP API with generated requests, valid and invalid, over jobs in every state.

No response is a 5xx, and each has the status, media type, headers and schema of the OpenAPI document.
The operations are divided into parts, which run at the same time: a case costs about 15 ms of processor time, most of
it for the generation and the client. `HTTP_CASES=5000 ./dev test tests/acceptance/test_http_schemas.py` sends as many
cases to each operation.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from harpcaller.http.app import OPERATIONS
from harpcaller.http.openapi import openapi_document
from harpcaller.model.jobs import State
from support.dispatcher import host_line, until
from support.http_api import RunningAPI, running_api
from support.scripted import scripted_harpd

CASES = int(os.environ.get("HTTP_CASES", "200"))
SEQUENCES = max(20, CASES // 10)  #: Sequences of several operations, as the links of the document connect them.
SECONDS = 300 + 5 * CASES  #: Far more than needed: about 40 s for a part on two cores with 200 cases.
PARTS = 3
EXAMPLE_JOB = "0199e9c1-0000-7000-8000-000000000000"
#: A response that never ends, and one that comes late after wrong tokens.
LASTING = ("follow_events", "begin_session")
#: A long value of a parameter makes a long URL.
SETTINGS = """\
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 414, 415, 422, 429]
"""


async def jobs_in_every_state(api: RunningAPI) -> dict[State, str]:
    async def submit(procedure: str, host: str = "web01", **members: Any) -> str:
        call = {"host": host, "procedure": procedure, "arguments": [], **members}
        job_id: str = (await api.client.post("/jobs", json=call)).json()["job"]
        return job_id

    queue = {"name": {"site": "blog"}}
    jobs = {State.RUNNING: await submit("hang", queue=queue), State.QUEUED: await submit("echo", queue=queue)}
    jobs |= {State.RETURNED: await submit("echo"), State.RAISED: await submit("raise")}
    jobs |= {State.FAILED: await submit("p", "nohost"), State.CANCELLED: await submit("echo", queue=queue)}
    await api.client.post(f"/jobs/{jobs[State.CANCELLED]}/cancel")
    for state, job_id in jobs.items():
        await until(api.dispatcher, job_id, lambda job, wanted=state: job.state is wanted, state)  # type: ignore[misc]
    return jobs


def document_for(jobs: list[str]) -> dict[str, Any]:
    """Return the OpenAPI document with these jobs as values of parameters, and without waits."""
    document = openapi_document(OPERATIONS)
    for operations in document["paths"].values():
        for operation in operations.values():
            parameters = [one for one in operation.get("parameters", ()) if one["name"] not in ("wait", "follow")]
            for parameter in parameters:
                if parameter["name"] == "job":
                    parameter["schema"] = {"anyOf": [{"enum": jobs}, parameter["schema"]]}
            operation["parameters"] = parameters
    return document


async def test_http_examples_are_accepted(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        job = (await api.client.post("/jobs?wait=20", json={"host": "x", "procedure": "p", "arguments": []})).json()[
            "job"
        ]
        for operation in OPERATIONS:
            if operation.body is not None:
                path = operation.path.replace("{job}", job)
                body = json.loads(json.dumps(operation.body.example).replace(EXAMPLE_JOB, job))
                reply = await api.client.request(operation.method, path, json=body)
                assert reply.status_code in operation.responses or operation.operation_id == "begin_session", reply.text


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("part", range(PARTS))
async def test_http_operations_conform_to_their_schemas(tmp_path: Path, part: int) -> None:
    tested = [one.operation_id for one in OPERATIONS if one.operation_id not in LASTING][part::PARTS]
    named = [f"--include-operation-id={name}" for name in tested]
    output = await conform(tmp_path, f"--max-examples={CASES}", "--phases=examples,coverage,fuzzing", *named)
    assert f"Tested: {len(tested)}" in output, output[-20_000:]


@pytest.mark.timeout(SECONDS + 60)
async def test_http_sequences_of_operations_conform_to_their_schemas(tmp_path: Path) -> None:
    named = [f"--exclude-operation-id={name}" for name in LASTING]
    await conform(tmp_path, f"--max-examples={SEQUENCES}", "--phases=stateful", *named)


async def conform(directory: Path, *options: str) -> str:
    """Send generated requests to a dispatcher of its own; return what the program prints."""
    with scripted_harpd(directory) as peer:
        async with running_api(directory, host_line(peer.port)) as api:
            jobs = await jobs_in_every_state(api)
            file = directory / "openapi.json"
            file.write_text(json.dumps(document_for(list(jobs.values()))))
            (directory / "schemathesis.toml").write_text(SETTINGS)
            command = [
                *(sys.executable, "-m", "schemathesis.cli", "run", str(file), f"--url={api.client.base_url}"),
                *("--header", f"Authorization: Bearer {api.token}", "--checks=all"),
                # The values of filters have a grammar that JSON Schema cannot describe, and wrong tokens cost seconds.
                "--exclude-checks=positive_data_acceptance,ignored_auth",
                "--generation-with-security-parameters=false",
                *("--seed=1", "--no-shrink", "--no-color", "--suppress-health-check=all", "--warnings=off"),
                *("--generation-database=none", "--request-timeout=60", "--max-response-time=60"),
                *("--continue-on-failure", *options),
            ]
            process = await asyncio.create_subprocess_exec(
                *command, cwd=directory, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
            )
            try:
                async with asyncio.timeout(SECONDS):
                    output, _ = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            assert process.returncode == 0, output.decode()[-20_000:]
            return output.decode()
