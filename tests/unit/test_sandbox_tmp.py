"""The private folder of a bubblewrap box: bounded, writable, and gone with the box."""

import errno
import json
import secrets
import shutil
from pathlib import Path

import pytest

from gruppo.sandbox import Sandbox
from gruppo.sandbox.bubblewrap import Bubblewrap
from support.boxes import linux, opened, script

pytestmark = [
    linux,
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
]
MIB = 1 << 20

PROGRAM = """
import json, os
at_first = os.listdir('/tmp')

def fill(path, size):
    done = 0
    try:
        with open(path, 'wb', buffering=0) as file:
            while done < size: done += file.write(bytes(min(1 << 16, size - done)))
    except OSError as error:
        return done, error.errno
    return done, 0

fills = [fill('/tmp/NAME-' + name, size << 20) for name, size in (('a', 2), ('b', 4), ('c', 2))]
kept = os.path.getsize('/tmp/NAME-a'), open('/tmp/NAME-a', 'rb').read() == bytes(2 << 20)
print(json.dumps([at_first, fills, kept, fill('/NAME', 1), fill('/dev/shm/NAME', 1)]))
"""


def test_files_go_to_a_private_folder_up_to_its_size() -> None:
    """A file as large as asked, one that ``file_mib`` ends, one for which no space is left."""
    name = f"gruppo-{secrets.token_hex(8)}"
    settings = Sandbox(kind="bubblewrap", cpu_s=5, wall_s=60.0, tmp_mib=6, file_mib=3)
    with opened(Bubblewrap, settings) as pool:
        outcomes = [script(pool, PROGRAM.replace("NAME", name)) for _ in range(2)]
    for outcome in outcomes:  # the second box finds nothing of the first one's
        assert (outcome.ended, outcome.code, outcome.stderr) == ("exit", 0, b"")
        at_first, fills, kept, root, shared = json.loads(outcome.stdout)
        assert at_first == []
        assert fills == [[2 * MIB, 0], [3 * MIB, errno.EFBIG], [MIB, errno.ENOSPC]]
        assert kept == [2 * MIB, True]
        assert root == [0, errno.EROFS]
        assert shared == [0, errno.ENOENT]
    places = [Path(place) for place in ("/", "/tmp", "/var/tmp", "/dev/shm")]
    assert [found for place in places for found in place.glob(f"*{name}*")] == []


def test_without_one_no_file_is_opened_for_writing() -> None:
    settings = Sandbox(kind="bubblewrap", cpu_s=5, wall_s=60.0)
    source = "try: open('/tmp/x', 'w')\nexcept OSError as error: print(error.errno)"
    with opened(Bubblewrap, settings) as pool:
        outcome = script(pool, source)
    assert (outcome.ended, outcome.stdout) == ("exit", b"%d\n" % errno.EPERM)
