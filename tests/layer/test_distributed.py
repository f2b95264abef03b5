"""A clip on 2, 3 and 4 processes (gloo) against one: outputs, gradients, and what is exchanged."""

import re
import time

import pytest

from tests.layer import clip_cases as cases

FRAME = 2 * 2 * 1 * cases.DIM  # numbers a frame sends: key and value, two clips, one token


@pytest.fixture(scope="module", params=cases.DIVISIONS)
def found(request, tmp_path_factory):
    """What every process of a group has found."""
    found = cases.start(request.param, tmp_path_factory.mktemp("clip"), "compare")
    assert None not in found
    return found


@pytest.mark.parametrize("layer", cases.LAYERS)
def test_a_shared_clip_is_the_whole_clip(layer, found):
    """Outputs, the gradient of the input and of each parameter; uneven parts."""
    assert max(each[layer] for each in found) < 1e-12


def test_float32_is_within_rounding(found):
    """On the even division and on the uneven one."""
    values = [d for each in found for key, d in each.items() if key.startswith("float32")]
    assert len(values) == 2 * len(found)
    assert max(values) < 1e-5


def test_sixteen_bits_are_as_exact_as_in_one_process(found):
    assert all(each["bfloat16"] < 2 * each["bfloat16 alone"] for each in found)


def test_the_same_bits_twice(found):
    assert all(each["same bits"] for each in found)


def test_compiled_and_checkpointed(found):
    if len(found) == 2:
        assert max(each[name] for each in found for name in ("compiled", "checkpointed")) < 1e-12


@pytest.mark.parametrize("bug", ["halo gradient", "neighbour"])
def test_a_planted_bug_is_seen(bug, found):
    assert max(each[f"planted {bug}"] for each in found) > 0.01


def test_only_what_is_read_travels_and_computation_goes_on(found):
    """Keys travel while queries are projected, and gradients of keys while theirs is computed."""
    frames, reach = cases.DIVISIONS[len(found)][1], 2
    ends = [sum(frames[: rank + 1]) for rank in range(len(frames))]
    for rank, each in enumerate(found):
        own = range(ends[rank] - frames[rank], ends[rank])
        reads = [range(end - n - reach, end + reach) for n, end in zip(frames, ends, strict=True)]
        to_all = sum(frame in read for frame in own for read in reads)
        halo = sum(frame in reads[rank] for frame in range(cases.FRAMES))
        assert each["calls"] == [
            ("mm", 0),  # keys and values
            ("all_to_all_single", FRAME * to_all),
            ("all_gather_into_tensor", FRAME * max(frames)),
            ("mm", 0),  # queries
            *[("wait_tensor", 0)] * 2,
            ("sta_forward", 0),
            *[("addmm", 0), ("mm", 0), ("mm", 0)],  # the last projection and its gradients
            ("sta_backward", 0),
            *[("all_to_all_single", FRAME * frames) for frames in (cases.FRAMES, halo)],
            *[("mm", 0)] * 2,
            *[("wait_tensor", 0)] * 2,
            *[("mm", 0)] * 2,
        ]


def test_a_process_that_hangs_is_told_of_within_the_timeout(found):
    for each in found[:-1]:
        told, seconds = each["hang"]
        assert "another process of the clip has stopped or does not answer, seen by Clip" in told
        assert 1 < seconds < 60


def test_a_process_that_dies_ends_the_others(tmp_path):
    began = time.monotonic()
    *others, dead = cases.start(3, tmp_path, "die")
    assert time.monotonic() - began < 120
    assert dead is None
    assert all(told.startswith("another process of the clip has stopped") for told in others)


REFUSED = {
    "too few": "ValueError: frames must be at least one for each of the {n} processes, got 1",
    "too many counts": "ValueError: .* at least 1 for each of the {n} .*, got \\(1, 1, 1, 1, 1",
    "none": "ValueError: frames must be a number of at least 1 for each of the {n} .*, got \\(0",
    "no int": "TypeError: frames must be an int or an int for each process, got 9.0",
    "two dimensions": "ValueError: group must be a mesh of one dimension, as mesh\\['clip'\\] is",
    "no group": "TypeError: group must be a ProcessGroup or a DeviceMesh, got str",
    "other frames": "ValueError: process 0 of .* holds {t} frames, got 7",
    "wrapped projection": "TypeError: qkv must be .*Linear where a clip is shared, got Sequential",
    "cache": "ValueError: cache and clip exclude each other, got both",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what, found):
    own = cases.DIVISIONS[len(found)][1][0]
    assert re.match(REFUSED[what].format(n=len(found), t=own), found[0]["refused"][what])
