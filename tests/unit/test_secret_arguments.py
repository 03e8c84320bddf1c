"""Secret arguments: masks, encryption for one job, key files."""

from __future__ import annotations

import json
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.ends import Raised
from harp.protocol.harpd import ExitInfo
from harp.protocol.json_text import Raw
from harp.protocol.schema import ProtocolError
from harp_daemon.secret_values import MAX_ARGUMENTS, MAX_TEXTS, forms_of, mask_json, mask_texts, texts_at
from harp_daemon.settings import ConfigError
from harpcaller.secret_arguments import CannotDecrypt, SecretKeys, add_key, load_keys, mask_message, mask_records


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> SecretKeys:
    file = tmp_path_factory.mktemp("keys") / "keys"
    add_key(file)
    return load_keys(file)


CASES = [
    (b'{"user": "a", "password":"hunter2"}', ["/password"], b'{"user":"a","password":"***"}'),
    (b'[1.0, 1e400, {"k": [ "x", 2 ]}]', ["/2/k/0"], b'[1.0,1e400,{"k":["***",2]}]'),
    (b'["a", {"b": 1}]', ["/0", "/1"], b'["***","***"]'),
    (
        b'{"a/b": 1, "m~n": 2, "": 3, "~1": 4}',
        ["/a~1b", "/m~0n", "/", "/~01"],
        b'{"a/b":"***","m~n":"***","":"***","~1":"***"}',
    ),
    ('{"é": "ü", "b": "\\ud800"}'.encode(), ["/b"], '{"é":"ü","b":"***"}'.encode()),
]


@pytest.mark.parametrize(("arguments", "pointers", "masked"), CASES)
def test_seal_masks_the_values_and_open_returns_them(
    keys: SecretKeys, arguments: bytes, pointers: list[str], masked: bytes
) -> None:
    sealed_arguments, sealed = keys.seal("job 1", Raw(arguments), pointers)
    assert json.loads(sealed_arguments) == json.loads(masked)
    found = keys.open("job 1", sealed_arguments, sealed)
    opened = found.arguments
    assert found.pointers == tuple(pointers)
    assert json.loads(opened) == json.loads(arguments)
    assert opened.count(b"1e400") == arguments.count(b"1e400"), "numbers keep their text"
    assert b"hunter2" not in sealed + sealed_arguments


@pytest.mark.parametrize(
    ("arguments", "pointers", "reason"),
    [
        (b'{"a": 1}', ["/b"], "no value at '/b'"),
        (b'{"a": 1}', ["a"], "expected a JSON pointer such as /password, got 'a'"),
        (b'{"a": 1}', [""], "expected a JSON pointer"),
        (b"[1]", ["/1"], "no value at '/1'"),
        (b"[1]", ["/-1"], "no value at '/-1'"),
        (b"[1]", ["/x"], "no value at '/x'"),
        (b'[{"a": 1}]', ["/0/a/b"], "no value at '/0/a/b'"),
        (b'{"a": 1, "a": 2}', ["/a"], "repeated key"),
        (b'{"a": {"b": 1}}', ["/a/b", "/a"], "into another secret value"),
        (b"[1]", ["/" + "9" * 5000], "no value at '/9999"),
        (b"[" * 9 + b"1" + b"]" * 9, ["/0" * 9], "at most 8 steps"),
        (b"[" + b"1," * 100 + b"1]", ["/0"], "more than 100 elements"),
    ],
)
def test_seal_refuses_pointers_without_a_value(
    keys: SecretKeys, arguments: bytes, pointers: list[str], reason: str
) -> None:
    with pytest.raises(ProtocolError, match=reason) as raised:
        keys.seal("job 1", Raw(arguments), pointers)
    assert len(raised.value.message) < 300


PAYLOADS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=20,
)


def pointers_in(value: Any, path: str = "") -> list[str]:
    children = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    found = []
    for name, child in children:
        pointer = f"{path}/{str(name).replace('~', '~0').replace('/', '~1')}"
        found += [pointer, *pointers_in(child, pointer)]
    return found


@given(arguments=st.lists(PAYLOADS, max_size=4) | st.dictionaries(st.text(max_size=5), PAYLOADS), data=st.data())
def test_sealed_arguments_are_opened_unchanged(keys: SecretKeys, arguments: Any, data: st.DataObject) -> None:
    text = Raw(json.dumps(arguments, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass"))
    every = [pointer for pointer in pointers_in(arguments) if pointer.count("/") <= 8]
    chosen = data.draw(st.lists(st.sampled_from(every), unique=True, max_size=3)) if every else []
    pointers = [one for one in chosen if not any(one.startswith(f"{other}/") for other in chosen)]
    masked, sealed = keys.seal("job", text, pointers)
    assert json.loads(keys.open("job", masked, sealed).arguments) == arguments


def test_sealed_values_open_for_their_job_only(keys: SecretKeys) -> None:
    masked, sealed = keys.seal("job 1", Raw(b'["secret"]'), ["/0"])
    assert keys.seal("job 1", Raw(b'["secret"]'), ["/0"])[1] != sealed
    with pytest.raises(CannotDecrypt, match="does not match key"):
        keys.open("job 2", masked, sealed)
    with pytest.raises(CannotDecrypt, match="does not match key"):
        keys.open("job 1", masked, sealed[:-1] + bytes([sealed[-1] ^ 1]))


def test_new_key_in_front_opens_what_an_older_one_sealed(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first_id = add_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    masked, sealed = load_keys(file).seal("job", Raw(b'["secret"]'), ["/0"])
    add_key(file)
    assert load_keys(file).open("job", masked, sealed).arguments == b'["secret"]'
    file.write_text(file.read_text().splitlines()[0])
    with pytest.raises(CannotDecrypt, match=f"has no key {first_id} any more; add it again"):
        load_keys(file).open("job", masked, sealed)


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        ("", 0o600, "has no key; run: harpcallerd secrets-key"),
        ("abc", 0o600, ":1: expected ID KEY"),
        ("00 AAAA", 0o600, ":1: expected ID KEY"),
        ("ü", 0o600, "not ASCII"),
        ("", 0o640, "others may read it; run: chmod 600"),
    ],
)
def test_mistakes_of_a_key_file_are_reported(tmp_path: Path, content: str, mode: int, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=reason):
        load_keys(file)
    if mode == 0o600 and content:
        with pytest.raises(ConfigError, match=reason):
            add_key(file)
        assert file.read_text() == content, "a file of something else is not overwritten"


def test_key_file_repeated_missing_or_a_link_is_refused(tmp_path: Path) -> None:
    file, link = tmp_path / "keys", tmp_path / "link"
    with pytest.raises(ConfigError, match="No such file"):
        load_keys(file)
    add_key(file)
    link.symlink_to(file)
    with pytest.raises(ConfigError, match="symbolic links"):
        load_keys(link)
    file.write_text(file.read_text() * 2)
    with pytest.raises(ConfigError, match=r":2: key .* is repeated"):
        load_keys(file)


def test_texts_of_secret_strings_are_masked(keys: SecretKeys) -> None:
    value = {"p": 'hünter"2', "list": ["hunter2", "abc", 12345]}
    masked, sealed = keys.seal("job", Raw(json.dumps([value]).encode()), ["/0"])
    texts = keys.open("job", masked, sealed).texts
    for ascii_only in (True, False):
        payload = json.dumps({"error": 'bad hünter"2 and hunter2; abc 12345'}, ensure_ascii=ascii_only)
        assert json.loads(mask_texts(Raw(payload.encode()), texts)) == {"error": "bad *** and ***; abc 12345"}
    assert mask_texts(b'["other"]', texts) == b'["other"]'


def test_records_are_masked_one_by_one(keys: SecretKeys) -> None:
    masked, sealed = keys.seal("job", Raw(json.dumps(["first\\nsecond", "hunter2"]).encode()), ["/0", "/1"])
    texts = keys.open("job", masked, sealed).texts
    records = [b'"first', b'second"', b'"hunter2"', b'"first\\\\nsecond"']
    assert mask_records(records, texts) == [b'"first', b'second"', b'"***"', b'"***"']
    unchanged = [b"1", b"2"]
    assert mask_records(unchanged, texts) is unchanged


def test_lines_of_a_secret_text_are_masked() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQ\nshort\n"
    texts = texts_at(Raw(json.dumps({"key": key, "other": 1}).encode()), ["/key", "/missing", "wrong", "/other"])
    assert mask_texts(b"read MIIEvQIBADANBg", texts) == b"read ***"
    assert mask_texts(b"a short line", texts) == b"a short line"
    assert mask_texts(repr(key).encode(), texts) == b"'***'"


def test_secret_arguments_above_the_limits_are_refused(keys: SecretKeys) -> None:
    long = Raw(json.dumps(["secret", "x" * MAX_ARGUMENTS]).encode())
    with pytest.raises(ProtocolError, match=f"at most {MAX_ARGUMENTS} bytes"):
        keys.seal("job", long, ["/0"])
    many = Raw(json.dumps([[f"secret {n}" for n in range(MAX_TEXTS + 1)]]).encode())
    with pytest.raises(ProtocolError, match=f"more than {MAX_TEXTS} texts"):
        keys.seal("job", many, ["/0"])
    assert texts_at(long, ["/0"]) == ()


def test_costly_pointers_take_no_long_turn(keys: SecretKeys) -> None:
    inner = b"[%b]" % b",".join([b"1"] * 30_000)
    deep, wide = (Raw(b"[" * depth + inner + b"]" * depth) for depth in (900, 0))
    flat = Raw(b"[" * 7 + b'"%b"' % (b"x" * 60_000) + b"]" * 7)
    for arguments, pointers in ((deep, ["/0" * 900] * 20), (wide, ["/0"] * 20), (flat, ["/0" * 7] * 20)):
        began_at = time.process_time()  # of this process, so that others do not count
        with suppress(ProtocolError):
            keys.seal("job", arguments, pointers)
        texts_at(arguments, pointers)
        assert time.process_time() - began_at < 1


def test_digest_depends_on_the_key(keys: SecretKeys, tmp_path: Path) -> None:
    add_key(tmp_path / "other")
    digest = keys.digest(b"text")
    assert digest == keys.digest(b"text")
    assert digest != load_keys(tmp_path / "other").digest(b"text")
    assert digest != keys.digest(b"text2")


@pytest.mark.parametrize("length", [5, 999, 70_000])
def test_long_text_is_masked_at_every_place(length: int) -> None:
    """Long texts are masked in steps; a secret may lie across the border of two steps."""
    secret, other = b"S" * length, b"tt" * 4
    for step in range(0, 7 * length, max(1, length // 3)):
        text = b"." * (4 * 70_000 - step) + secret + b"." * 5 + other + b"." * 300_000 + secret
        assert mask_texts(text, [secret, other]) == text.replace(secret, b"***").replace(other, b"***")


@pytest.mark.parametrize("secret", ["it's", 'a "quoted" one', "hün'ter\\2", "a\tb\u2028c"])
def test_texts_are_masked_in_longer_reprs_and_in_json(secret: str) -> None:
    texts = forms_of([secret])
    for around in ("{}", '"{}"', "'{}'"):
        longer = around.format(secret)
        as_bytes = repr(longer.encode())
        for written in (longer, repr(longer), as_bytes, json.dumps([longer]), json.dumps([longer], ensure_ascii=False)):
            masked = mask_texts(written.encode(), texts).decode()
            assert "***" in masked, written
            assert len(masked) <= len(written) - len(secret) + 3, masked
            for payload in (json.dumps(written), json.dumps(written, ensure_ascii=False)):
                assert json.loads(mask_json(Raw(payload.encode()), texts)) == masked


@given(value=PAYLOADS, data=st.data(), ascii_only=st.booleans())
def test_masked_payload_has_the_same_values_but_strings(value: Any, data: st.DataObject, ascii_only: bool) -> None:
    """A secret text may be any part of the JSON text: a number, ``null``, what is between values, half an escape."""
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    start = data.draw(st.integers(0, len(text)))
    secret = text[start : start + data.draw(st.integers(4, 12))].decode("utf-8", "ignore")
    masked = json.loads(mask_json(Raw(text), forms_of([secret]))) if len(secret) >= 4 else value

    def compare(found: Any, expected: Any) -> None:
        if isinstance(expected, str):
            assert found == expected or (secret not in found and "***" in found)
        elif isinstance(expected, list):
            for pair in zip(found, expected, strict=True):
                compare(*pair)
        elif isinstance(expected, dict):
            for name in expected.keys() & found.keys():  # others are masked, too
                compare(found[name], expected[name])
        else:
            assert found == expected

    compare(masked, value)


@pytest.mark.parametrize("secret", ["null", "1234", "exit", '": ', "true", "code"])
def test_exit_info_keeps_its_form_whatever_is_secret(secret: str) -> None:
    info = {
        "exit": None,
        "signal": "SIGKILL",
        "code": 12345,
        "ok": True,
        "stderr": ["the exit code is 1234, null, true"],
    }
    masked = mask_message(ExitInfo(Raw(json.dumps(info).encode())), forms_of([secret]))
    assert isinstance(masked, ExitInfo)
    found = json.loads(masked.info)
    assert {**found, "stderr": None} == {**info, "stderr": None}
    assert secret not in found["stderr"][0]


@pytest.mark.parametrize("secret", ["u00fc", "ünde"])
def test_message_of_an_exception_is_masked_as_text(secret: str) -> None:
    masked = mask_message(Raised("E", f"gründe: {secret}"), forms_of([secret]))
    assert isinstance(masked, Raised)
    assert secret not in masked.message
    assert masked.message.startswith("gr")


def test_name_of_an_exception_is_masked() -> None:
    masked = mask_message(Raised("hunter2Error", "m", Raw(b'{"class":"hunter2Error"}')), forms_of(["hunter2"]))
    assert masked == Raised("***Error", "m", Raw(b'{"class":"***Error"}'))


@pytest.mark.parametrize("mark", ["... (70000 characters, cut at 65536)", "... (cut: it had 2000000 bytes)"])
def test_message_that_is_cut_within_a_secret_has_no_part_of_it(mark: str) -> None:
    masked = mask_message(Raised("E", f"{'x' * 100}hunter{mark}"), forms_of(["hunter2-correct"]))
    assert isinstance(masked, Raised)
    assert "hunt" not in masked.message
    assert masked.message.startswith("x" * 90)
    assert masked.message.endswith(mark)


def test_other_line_breaks_are_parts_of_lines() -> None:
    """The lines of a log end with a line feed only."""
    secret = "pass\x0cword\rone\u2028\nand another line\r\nx"
    texts = texts_at(Raw(json.dumps([secret]).encode()), ["/0"])
    assert mask_texts("pass\x0cword\rone\u2028".encode(), texts) == b"***"
    assert mask_texts(b"and another line", texts) == b"***"


def test_short_secret_in_a_longer_one_leaves_no_rest_of_it() -> None:
    long, short = b"-----BEGIN----- abcd", b"BEGIN"
    for step in range(300):
        text = b"." * (256 * 1024 - step) + long + b"." * 300_000
        assert mask_texts(text, [long, short]) == text.replace(long, b"***")
