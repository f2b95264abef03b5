"""TimeSformer, ViViT and VideoMAE of the transformers library with the fused attention."""

import copy
import io
import re

import pytest
import torch
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
    VivitConfig,
    VivitForVideoClassification,
)

from stat_kernels.integrations.transformers import convert, load

FRAMES = 4
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 32,
    "num_labels": 5,
}
EVERY_KEY = {"window": 2 * FRAMES - 1, "short_stride": 1, "long": "none"}


def videomae(**options):
    return VideoMAEForVideoClassification(VideoMAEConfig(**SIZES, patch_size=8, **options))


def vivit(**options):
    return VivitForVideoClassification(VivitConfig(**SIZES, tubelet_size=[2, 8, 8], **options))


def timesformer(kind="divided_space_time", **options):
    return TimesformerForVideoClassification(
        TimesformerConfig(**SIZES, patch_size=8, attention_type=kind, **options)
    )


def joint():
    return timesformer("joint_space_time", num_frames=FRAMES)


def divided():
    return timesformer("divided_space_time", num_frames=FRAMES)


def space_only():
    return timesformer("space_only", num_frames=FRAMES)


def two_frames_a_token(family):
    return lambda: family(num_frames=2 * FRAMES)


ALL = {
    "videomae": two_frames_a_token(videomae),
    "vivit": two_frames_a_token(vivit),
    "joint": joint,
    "divided": divided,
    "space_only": space_only,
}


def make(family):
    """A small model, its parameters far from their special values."""
    model = ALL[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def pixels(model, count=2):
    return torch.randn(count, model.config.num_frames, 3, 32, 32)


@pytest.mark.parametrize("family", ["videomae", "vivit", "joint"])
def test_with_every_key_it_is_the_original(family):
    model = make(family)
    x = pixels(model)
    expected = model(x).logits
    assert convert(model, **EVERY_KEY) is model
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)


def test_frames_apart_are_the_original():
    """Space-only and divided TimeSformers attend within a frame, as a window of 1 does."""
    for family, options in (("space_only", {}), ("divided", {"keep_temporal": True})):
        model = make(family)
        x = pixels(model)
        expected = model(x).logits
        convert(model, window=1, long="none", **options)
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_divided_timesformer_becomes_a_joint_one():
    """Without its temporal attention it is the joint model of the same weights, given every key."""
    model, twin = make("divided"), joint().eval()
    twin.load_state_dict(
        {name: v for name, v in model.state_dict().items() if "temporal_" not in name}
    )
    x = pixels(model)
    convert(model, **EVERY_KEY)
    assert model.config.attention_type == "joint_space_time"
    torch.testing.assert_close(model(x).logits, twin(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_by_default_the_frames_are_joined(family):
    model = make(family)
    x = pixels(model)
    before = model(x).logits
    convert(model, keep_temporal=family == "divided")
    after = model(x).logits
    assert 1e-4 < (after - before).norm() / before.norm() < 0.5
    other = x.clone()
    other[:, -2:] += 1
    base = getattr(model, model.base_model_prefix)
    tokens = [base(pixel_values).last_hidden_state for pixel_values in (x, other)]
    assert ((tokens[0] - tokens[1]).abs().amax(-1) > 1e-6).all()  # every token sees the last frames


@pytest.mark.parametrize("family", ["videomae", "vivit", "joint"])
def test_a_frame_is_the_tokens_of_one_time(family):
    """With a window of 1 a change of one moment stays there, however tokens are ordered."""
    model = convert(make(family), window=1, long="none")
    base = getattr(model, model.base_model_prefix)
    x = pixels(model)
    other = x.clone()
    other[:, -1] += 1
    first = [base(p, output_hidden_states=True).hidden_states[1] for p in (x, other)]
    changed = ((first[0] - first[1]).abs().amax((0, 2)) > 1e-6)[-FRAMES * 16 :]
    by_time = changed.view(16, FRAMES).T if family == "joint" else changed.view(FRAMES, 16)
    assert by_time[-1].all()
    assert not by_time[:-1].any()


@pytest.mark.parametrize("family", ALL)
def test_saved_and_loaded(family, tmp_path):
    model = convert(make(family), window=5, short_stride=3)
    x = pixels(model)
    model.save_pretrained(tmp_path)
    again = load(type(model), tmp_path).eval()
    assert again.config.shrinking_temporal == model.config.shrinking_temporal
    assert torch.equal(again(x).logits, model(x).logits)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert not torch.equal(plain(x).logits, model(x).logits)
    assert torch.equal(convert(plain, window=5, short_stride=3)(x).logits, model(x).logits)


@pytest.mark.parametrize("family", ["videomae", "vivit"])
def test_attention_chosen_by_name(family, tmp_path):
    model = make(family)
    x = pixels(model)
    model.save_pretrained(tmp_path)
    named = type(model).from_pretrained(tmp_path, attn_implementation="shrinking_temporal").eval()
    assert torch.equal(named(x).logits, convert(model)(x).logits)
    model.set_attn_implementation("sdpa")  # and back
    assert not torch.equal(named(x).logits, model(x).logits)


@pytest.mark.parametrize("family", ["joint", "divided", "space_only"])
def test_a_timesformer_chosen_by_name_is_refused(family, tmp_path):
    """TimeSformer ignores the name: its models would stay as they are without a word."""
    make(family).save_pretrained(tmp_path)
    cls = TimesformerForVideoClassification
    with pytest.raises(ValueError, match=r"does not choose its attention by name.*convert$"):
        cls.from_pretrained(tmp_path, attn_implementation="shrinking_temporal")
    convert(cls.from_pretrained(tmp_path))  # the way that the message names


@pytest.mark.parametrize("family", ["videomae", "vivit", "joint"])
@pytest.mark.parametrize("chosen", ["converted", "by name", "set later"])
def test_attention_weights_are_refused(family, chosen, tmp_path):
    model = make(family)
    x = pixels(model)
    model.save_pretrained(tmp_path)
    if family == "joint" or chosen == "converted":
        convert(model)
    elif chosen == "set later":
        model.set_attn_implementation("shrinking_temporal")
    else:
        model = type(model).from_pretrained(tmp_path, attn_implementation="shrinking_temporal")
    base = getattr(model, model.base_model_prefix)
    for asked in (model, base, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="output_attentions must be False: the fused"):
            asked(x, output_attentions=True)
        asked(x, output_attentions=False, output_hidden_states=True)
    if family != "joint":
        model.set_attn_implementation("eager")
        assert len(model(x, output_attentions=True).attentions) == 2


def test_loading_what_was_never_converted(tmp_path):
    make("vivit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use VivitForVideoClassification"):
        load(VivitForVideoClassification, tmp_path)


def gradients(model, run, x):
    model.zero_grad()
    run(x).logits.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["vivit", "joint"])
def test_compile_in_one_graph(family):
    torch._dynamo.reset()
    model = convert(make(family))
    x = pixels(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_autocast_copies_and_checkpointing(family):
    model = convert(make(family))
    x = pixels(model)
    expected = model(x).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).logits - expected).norm() / expected.norm() < 0.05
    before = gradients(model.train(), model, x)
    model.gradient_checkpointing_enable()
    for a, b in zip(gradients(model, model, x), before, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (lambda: ViTModel(ViTConfig(**SIZES)), {}, TypeError, "ViViT or VideoMAE .* got ViTModel"),
        (lambda: torch.nn.Linear(2, 2), {}, TypeError, "got Linear"),
        (lambda: convert(vivit()), {}, TypeError, "VivitForVideoClassification that is converted"),
        (lambda: convert(timesformer()), {}, TypeError, "converted already"),
        (lambda: vivit(attention_probs_dropout_prob=0.1), {}, ValueError, "must be 0, got 0.1"),
        (videomae, {"keep_temporal": True}, ValueError, "needs a TimeSformer with attention_type"),
        (videomae, {"long": "class"}, ValueError, "for VideoMAEForVideoClassification 'mean'"),
        (timesformer, {"long": "class"}, ValueError, "'mean' or 'none' work"),
        (videomae, {"kv_stride": 3}, ValueError, "kv_stride must divide the 4 x 4 grid"),
    ],
)
def test_what_cannot_be_converted(build, options, error, message):
    with pytest.raises(error, match=message):
        convert(build(), **options)


def test_pretraining_cannot_be_converted():
    decoder = {"decoder_hidden_size": 64, "decoder_num_attention_heads": 2}
    model = VideoMAEForPreTraining(VideoMAEConfig(**SIZES, patch_size=8, **decoder))
    with pytest.raises(TypeError, match="not its pre-training"):
        convert(model)


def test_tokens_that_are_no_clip():
    """Masked tokens and other numbers of frames are refused by what the configuration tells."""
    encoder = convert(VideoMAEModel(VideoMAEConfig(**SIZES, patch_size=8, num_frames=8)).eval())
    x = pixels(encoder)
    masked = torch.arange(4 * 16).expand(2, -1) % 2 == 0
    with pytest.raises(ValueError, match="k must hold 4 frames x 4 x 4 tokens a clip, got 32"):
        encoder(x, bool_masked_pos=masked)
    model = convert(joint().eval())
    with pytest.raises(ValueError, match=re.escape("(B, 1 + 16 * 4, C) as the configuration")):
        model(torch.randn(1, FRAMES + 2, 3, 32, 32))
