"""All contracts for families that are reduced behind the projector, in place."""

import pytest
import torch
from reference_units import entrance, expected_logits
from tiny_hosts import IMAGE, VIDEO, cache_lengths, fingerprint_of
from tiny_units import (
    FILMED,
    INSIDE_AND_BEHIND,
    MANY,
    ONE,
    QWEN,
    REFUSED,
    SHARE,
    TRACED,
    UNITS,
    Shown,
    counts_of,
    make,
    model_for,
    prompt,
)
from transformers import GenerationMixin

from frugalvlm.engine import session
from frugalvlm.methods import METHODS, FastV, VisionZip
from frugalvlm.views import UnsupportedError

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
STEPS = 3
FILM = [[3, Shown(1, 2, 3, frames=2), 4]]


def generated(model, inputs, steps=STEPS, **settings):
    return model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip


def mixes_pictures_up(host):
    """Whether this release repeats pixels for beams, and takes flat ones apart."""
    return host == "internvl" and not hasattr(GenerationMixin, "_supports_mm_encoder_outputs")


@pytest.mark.parametrize(("key", "host"), TRACED)
def test_keeping_everything_is_the_identity_and_nothing_stays_behind(key, host):
    model, inputs = model_for(host), prompt(host, MANY)
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True)
        said = generated(model, inputs).sequences
        left = fingerprint_of(model)
        with make(key, model, 1.0).on(model):
            inside = model(**inputs, output_hidden_states=True)
            again = generated(model, inputs).sequences
    assert torch.equal(inside.logits, before.logits)
    for own, other in zip(inside.hidden_states, before.hidden_states, strict=True):
        assert torch.equal(own, other)
    assert torch.equal(said, again)
    after = fingerprint_of(model)
    assert after == left
    assert not session._SESSIONS


@pytest.mark.parametrize("rows", [ONE, MANY[1:2]], ids=["one", "two pictures"])
@pytest.mark.parametrize(("key", "host"), TRACED)
def test_pruned_run_equals_the_full_run_with_hidden_keys(key, host, rows):
    model, inputs = model_for(host), prompt(host, rows)
    method = make(key, model)
    with method.on(model) as trace:
        out = generated(model, inputs)
        tokens = [round(n * len(counts_of(host, rows))) for n in trace.tokens_per_layer]
    expected, lengths = expected_logits(
        method, model, host, rows[0], out.sequences[0, -STEPS:-1].tolist()
    )
    logits = torch.stack(out.logits, 1)[0]
    assert logits.abs().max() > 0.5, "logits too small to tell runs apart"
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)
    assert cache_lengths(out.past_key_values) == [n + STEPS - 1 for n in lengths]
    rest = inputs["input_ids"].shape[1] - sum(counts_of(host, rows))
    assert [n + rest for n in tokens] == lengths
    if key not in ("vanilla", "uniform", "avgpool", "random"):
        assert min(tokens) < sum(counts_of(host, rows)), "nothing was dropped"


@pytest.mark.parametrize(("key", "host"), TRACED)
def test_a_share_is_of_each_picture(key, host):
    if METHODS[key].adaptive or key in ("vanilla", "gsearch", "gsearch_bayes"):
        pytest.skip("keeps what a picture needs, all, or another number in every layer")
    model = model_for(host)
    with make(key, model).on(model) as trace, torch.no_grad():
        model(**prompt(host, MANY))
    crops = [1 if host in QWEN else n // 9 for n in counts_of(host, MANY)]
    wanted = [
        crop * max(1, int(SHARE * (n // crop)))
        for n, crop in zip(counts_of(host, MANY), crops, strict=True)
    ]
    counts = [len(image) for image in trace._origins()]
    if issubclass(METHODS[key], session.EncoderReducer):
        assert counts == wanted
    if key in ("fastv", "sgl", "pyramiddrop") and host != "internvl":
        assert [len(kept) for kept in trace.kept] == wanted


@pytest.mark.parametrize(("key", "host"), INSIDE_AND_BEHIND)
def test_a_padded_batch_equals_its_items(key, host):
    model = model_for(host)
    with make(key, model).on(model), torch.no_grad():
        alone = [model(**prompt(host, [row])).logits[0] for row in MANY]
        for side in ("left", "right"):
            batch = prompt(host, MANY, side)
            given = {}
            if host not in QWEN:  # those count from the mask; these from the padding
                given["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            together = model(**batch, **given).logits
            for one, own, mask in zip(alone, together, batch["attention_mask"], strict=True):
                torch.testing.assert_close(own[mask.bool()], one, **CLOSE)
        said = generated(model, prompt(host, MANY)).sequences[:, -STEPS:]
        for row, own in zip(MANY, said, strict=True):
            one = generated(model, prompt(host, [row])).sequences[0, -STEPS:]
            assert own.tolist() == one.tolist()


@pytest.mark.parametrize(("key", "host"), INSIDE_AND_BEHIND)
def test_beams_in_a_batch_equal_beams_alone_with_and_without_a_cache(key, host):
    """Several pictures in one prompt, whose features are repeated with it."""
    if mixes_pictures_up(host):
        pytest.skip("refused: see below")
    model, settings = model_for(host), {"num_beams": 2, "num_return_sequences": 2}
    with make(key, model).on(model):
        together = generated(model, prompt(host, MANY), **settings).sequences[:, -STEPS:]
        alone = [
            generated(model, prompt(host, [row]), **settings).sequences[:, -STEPS:] for row in MANY
        ]
        assert together.tolist() == torch.cat(alone).tolist()
        if key == "early_exit":
            return  # acts on decoding passes, which there are with a cache only
        fresh = generated(model, prompt(host, MANY), **settings, use_cache=False)
        assert together.tolist() == fresh.sequences[:, -STEPS:].tolist()


@pytest.mark.parametrize("host", UNITS)
def test_beams_look_at_the_pictures_of_their_prompt(host):
    """The first step of beams is the prompt's own, whatever `generate` does with its features."""
    model, inputs = model_for(host), prompt(host, MANY)
    if mixes_pictures_up(host):
        with VisionZip(2, 1).on(model), pytest.raises(UnsupportedError, match="mixes up"):
            generated(model, inputs, num_beams=2)
        return
    with VisionZip(2, 1).on(model), torch.no_grad():
        out = generated(model, inputs, num_beams=2, output_scores=True)
        plain = model(**inputs).logits[:, -1]
    first = out.logits[0][::2]
    torch.testing.assert_close(first, plain.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("key", "host"), TRACED)
def test_steps_by_hand(key, host):
    """Fed one by one or together, positions given or left to the model, and in two caches."""
    model, tokens = model_for(host), torch.arange(5, 8)[None]

    def feed(chunks, given):
        inputs = prompt(host)
        out = model(**inputs, use_cache=True)
        cache, logits, start = out.past_key_values, [out.logits[:, -1:]], 0
        after = inputs["input_ids"].shape[1] if given_1d else entrance_positions.max() + 1
        for size in chunks:
            more = {"input_ids": tokens[:, start : start + size], "past_key_values": cache}
            if given:
                positions = (after + torch.arange(start, start + size))[None]
                more["position_ids"] = positions if given_1d else positions.expand(3, 1, -1)
            start += size
            logits.append(model(**more).logits)
        return torch.cat(logits, 1)

    given_1d = host not in QWEN
    entrance_positions = entrance(model, prompt(host))["position_ids"]
    with make(key, model).on(model), torch.no_grad():
        expected = feed([1, 1, 1], True)
        for chunks in ([1, 1, 1], [2, 1], [3]):
            for given in (True, False):
                torch.testing.assert_close(feed(chunks, given), expected, **CLOSE)


@pytest.mark.parametrize(("key", "host"), FILMED)
def test_videos_are_reduced_frame_by_frame(key, host):
    model, inputs = model_for(host), prompt(host, FILM)
    method = make(key, model)
    with method.on(model) as trace:
        out = generated(model, inputs)
        assert len(trace.kept) == (0 if key == "vanilla" else 2) or key == "vanilla"
    expected, _ = expected_logits(
        method, model, host, FILM[0], out.sequences[0, -STEPS:-1].tolist()
    )
    torch.testing.assert_close(
        torch.stack(out.logits, 1)[0], expected.float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("host", UNITS)
def test_a_conversation_goes_on(host):
    """A second question to a cache that lacks tokens, as one prompt and by steps."""
    model, inputs = model_for(host), prompt(host)
    more = torch.tensor([[7, 8, 9]])
    with FastV(3, 1).on(model), torch.no_grad():
        first = generated(model, inputs, steps=2)
        ids = torch.cat([first.sequences, more], 1)
        plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = generated(model, plain, past_key_values=first.past_key_values).logits
        whole = prompt(host)
        cache = model(**whole, use_cache=True).past_key_values
        fed = ids[:, whole["input_ids"].shape[1] :]
        by_hand = model(input_ids=fed, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(second[0], by_hand.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("key", "host"), sorted(REFUSED))
def test_what_is_refused_says_why(key, host):
    with (
        pytest.raises(UnsupportedError, match=r"no \[CLS\]|processor|tower's last"),
        METHODS[key].for_share(SHARE).on(model_for(host)),
    ):
        pass


@pytest.mark.parametrize("host", QWEN)
def test_features_from_outside_are_refused_and_mixed_batches_too(host):
    model, inputs = model_for(host), prompt(host)
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        given = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")}
        with VisionZip(2, 1).on(model), pytest.raises(UnsupportedError, match="pass pixel_values"):
            model(**given, mm_encoder_outputs={"image": features})
    film, picture = prompt(host, FILM), prompt(host)
    both = {**film, **{k: v for k, v in picture.items() if k.startswith(("pixel", "image"))}}
    ids = torch.cat([film["input_ids"], picture["input_ids"]], 1)
    both["input_ids"], both["attention_mask"] = ids, torch.ones_like(ids)
    both["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    with FastV(2).on(model), pytest.raises(UnsupportedError, match="one batch"):
        model(**both)
