"""A clip on 2, 3 and 4 processes (gloo) against one: outputs, gradients, and what is exchanged."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from stat_kernels.distributed import ClipParallel
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


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_clip_that_is_not_shared(group):
    layer = cases.layer_of()
    clip = ClipParallel(group, cases.FRAMES)
    assert (
        cases.difference(cases.results(layer, clip), cases.results(layer, None), clip.own) < 1e-14
    )


@pytest.mark.parametrize(
    ("frames", "error", "told"),
    [
        (0, ValueError, "frames must be at least one for each of the 1 processes, got 0"),
        ((3, 4), ValueError, r"at least 1 for each of the 1 processes, got \(3, 4\)"),
        ((0,), ValueError, r"at least 1 for each of the 1 processes, got \(0,\)"),
        (2.0, TypeError, "frames must be an int or an int for each process, got 2.0"),
    ],
)
def test_frames_that_cannot_be_divided(frames, error, told, group):
    with pytest.raises(error, match=told):
        ClipParallel(group, frames)


def test_a_group_must_be_one_dimension(group):
    with pytest.raises(ValueError, match=r"group must be a mesh of one dimension"):
        ClipParallel(init_device_mesh("cpu", (1, 1)), 4)
    with pytest.raises(TypeError, match="must be a ProcessGroup or a DeviceMesh, got str"):
        ClipParallel("world", 4)


def test_other_frames_than_its_own_are_refused(group):
    clip = ClipParallel(group, 4)
    with pytest.raises(ValueError, match=r"process 0 of .*frames=\(4,\)\) holds 4 frames, got 3"):
        cases.layer_of()(
            torch.zeros(1, 3, 13, cases.DIM, dtype=torch.float64), cases.GRID, clip=clip
        )


def test_a_projection_that_is_no_linear_layer_is_refused(group):
    """A wrapped one, as for low-rank adaptation: its weight is not all that it computes."""
    layer = cases.layer_of()
    layer.qkv = torch.nn.Sequential(layer.qkv)
    with pytest.raises(TypeError, match="where a clip is shared, got Sequential"):
        cases.results(layer, ClipParallel(group, cases.FRAMES))
