"""The form of a job in lists, for all APIs. Spec: docs/job-filters.md."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from harp.protocol.json_text import Envelope, Raw, dumps
from harpcaller.model.jobs import JobSummary


def encode_row(summary: JobSummary, rights: Sequence[str]) -> Envelope:
    """Return the JSON object of a job in a list; `rights` are those of `ActingAs.rights`. The queue's name is `Raw`."""
    queue = None if summary.queue_id is None else Envelope(id=summary.queue_id, name=summary.queue)
    return Envelope(
        job=summary.id,
        state=summary.state.value,
        host=summary.host,
        procedure=summary.procedure,
        queue=queue,
        owner=summary.owner,
        time=Envelope(submit=summary.submitted, start=summary.started, end=summary.ended),
        records=summary.records,
        end_type=summary.end_type,
        end_message=summary.end_message,
        stop=None if summary.stop is None else summary.stop.value,
        holds_slot=summary.holds_slot,
        unreachable_since=summary.unreachable_since,
        arguments_preview=summary.arguments_preview,
        info_preview=summary.info_preview,
        run=None,
        rerun_of=summary.rerun_of,
        can=list(rights),
    )


def dump_row(row: Envelope) -> Raw:
    """Return the text of a row, in a twentieth of the time of `dumps`: pages have 500 rows, events many more."""
    queue, plain = row.get("queue"), dict(row)
    if queue is not None and isinstance(queue["name"], Raw):
        plain["queue"] = {**queue, "name": msgspec.Raw(queue["name"])}
    try:
        return Raw(msgspec.json.encode(plain))
    except UnicodeEncodeError:  # a text may have half a character
        return dumps(row)
