"""A small model that answers first, and what its attention says about the visual tokens.

The guide runs as it is: prompt and greedy answer, any attention kernel, its own cache. Hooks keep
what went into the attention of its decoder layers, and the rows that count (of the prompt's tail
and of the answer's tokens) are computed from that afterwards, so no attention map ever exists and
memory stays linear in the number of visual tokens.

Inside a guided block the guide is asked when the large model is about to drop tokens, once per
prompt. Its work is therefore inside every FLOP count, time and energy of the large model's prefill.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from frugalvlm.engine.blocks import block
from frugalvlm.engine.calls import arguments_of
from frugalvlm.engine.generation import given_prompt
from frugalvlm.engine.session import operate
from frugalvlm.engine.subset import Subset
from frugalvlm.hosts import Host, host_for
from frugalvlm.hosts.base import FamilyModule, ImageLayout
from frugalvlm.methods.base import GuidedReducer
from frugalvlm.operators import operates
from frugalvlm.trace import Trace
from frugalvlm.views import LayerView, UnsupportedError, keep_top

_READING = threading.RLock()
# What describes the large model's own call, not the prompt.
_NOT_THE_PROMPT = ("position_ids", "inputs_embeds", "cache_position", "labels")


@dataclass(frozen=True)
class Guidance:
    """What a guide did with a batch of prompts.

    Attributes:
        answer: [batch, new] its greedy answers, end of sequence included.
        valid: [batch, new] which of these tokens belong to the answer.
        log_probs: [batch, new] of each token; 0 where it is not valid.
        attention: [layers, sources, images, visual] attention that visual tokens receive, summed
            over heads and query rows. Sources: the last prompt token; the prompt, from its last
            visual token on; the answer's tokens that were fed back (all but the last).
            Slots behind an image's last token hold -1.
        counts: visual tokens of each image.
        prompt: what the guide's decoder read; `Guide.consistency` reads a part of it again.
    """

    answer: Int[Tensor, "batch new"]
    valid: Bool[Tensor, "batch new"]
    log_probs: Float[Tensor, "batch new"]
    attention: Float[Tensor, "layers sources images visual"]
    counts: tuple[int, ...]
    prompt: Prompt

    def of(self, images: list[int]) -> Guidance:
        """What it says of some of the images, by number; each may be named more than once."""
        counts = tuple(self.counts[i] for i in images)
        attention = self.attention[:, :, images, : max(counts)]
        return replace(self, attention=attention, counts=counts)

    def each(self, copies: int) -> Guidance:
        """What it says of the images of a batch in which every prompt stands several times."""
        rows = [image.row for image in self.prompt.images]
        return self.of(
            [
                i
                for row in sorted(set(rows))
                for _ in range(copies)
                for i, own in enumerate(rows)
                if own == row
            ]
        )


@dataclass(frozen=True)
class Prompt:
    """A batch of left-padded prompts as a decoder reads them; `real` marks what is no padding.

    `planes` are what it adds behind its first layers, see `Host.planes`.
    """

    embeds: Float[Tensor, "batch length width"]
    positions: Tensor | None
    real: Bool[Tensor, "batch length"]
    images: list[ImageLayout]
    planes: list[Tensor] = field(default_factory=list)


class Guide(nn.Module):
    """A small vision-language model of the large one's family. Calling it gives a `Guidance`.

    It is a module so that FLOP counters find its work under its name.

    Args:
        model: the small model, unmodified.
        name: what records call it; name its weights, for example `pocket-llava-small@1f0c`.
        max_new_tokens: length of its answer (released code: 10 or 100, by benchmark).

    Raises:
        UnsupportedError: for a model family that no host knows.
    """

    def __init__(self, model: PreTrainedModel, name: str = "", max_new_tokens: int = 10) -> None:
        super().__init__()
        self.host: Host = host_for(model)
        self.host.check_decoder()
        self.model: FamilyModule = self.host.model
        self.name = name or model.config.name_or_path or type(model).__name__
        self.max_new_tokens = max_new_tokens

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a large model that does not read the very prompts that the guide reads.

        Raises:
            UnsupportedError: another tokenizer, other visual tokens, or the guide itself.
        """
        host = host_for(model)
        if host.model is self.model:
            raise UnsupportedError(
                "A model cannot answer while it is under way: guide it by a small model, or by a "
                "copy of itself (copy.deepcopy)."
            )
        words, others = _vocabulary(self.model), _vocabulary(host.model)
        if words != others:
            raise UnsupportedError(
                "The guide must read the model's own prompts, but its tokenizer is another one: "
                f"{words[0]} entries and image token {words[1]}, the model has {others[0]} and "
                f"{others[1]}; take a small model of the same family."
            )
        if self.host.shape.grid != host.shape.grid or _tiling(self.model) != _tiling(host.model):
            raise UnsupportedError(
                "The guide must have the model's visual tokens, in the same order: it sees "
                f"{_sight(self.host)}, the model {_sight(host)}; take a small model of the same "
                "family and input size."
            )

    @torch.no_grad()
    def forward(self, inputs: dict[str, Any], placeholders: Tensor | None = None) -> Guidance:
        """Answer a batch of prompts.

        Args:
            inputs: what the processor returns.
            placeholders: bool [batch, length] on the CPU, for inputs without values (meta tensors).
        """
        host, inputs = self.host, self._prepared(inputs)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if placeholders is None or not ids.is_meta:
            placeholders = host.placeholders(ids).cpu()
        images = host.images(placeholders, inputs)
        # One reading at a time: a guide may serve several threads.
        with _READING, _Reader(host) as read:
            answer, logits = self._steps(inputs) if ids.is_meta else self._generate(inputs)
        valid = self._valid(answer)
        log_probs = logits.log_softmax(-1, dtype=torch.float32)
        log_probs = log_probs.gather(-1, answer[..., None])[..., 0] * valid
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        queries, weights = _queries(images, ids.shape[1], valid)
        fed = answer.shape[1] - 1
        keys = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), fed)], 1)
        every_row = queries.expand(len(ids), -1)
        received = []
        for layer, seen in zip(host.language_model.layers, read.layers, strict=True):
            hidden, raw_keys, rotary = seen.joined()
            rows = host.attention_rows(layer.self_attn, hidden, raw_keys, rotary, keys, every_row)
            received.append(torch.einsum("bhqk,bsq->bsk", rows, weights.to(rows.dtype)))
        return Guidance(
            answer, valid, log_probs, _by_image(torch.stack(received), images),
            tuple(len(image.slots) for image in images),
            Prompt(read.embeds[0], read.positions[0], real, images, read.planes),
        )  # fmt: skip

    @torch.no_grad()
    def consistency(
        self, guidance: Guidance, ranking: Float[Tensor, "images visual"], share: float = 0.05
    ) -> Float[Tensor, " batch"]:
        """Probability of the guide's own answer when it sees only the highest ranked visual tokens.

        One pass without a cache (section 3.3): the others are gone from the first layer on, kept
        tokens keep their positions, the answer is given. The product is not length-normalised.

        Args:
            guidance: what `forward` gave.
            ranking: higher is kept.
            share: of the visual tokens of each image.
        """
        prompt, model = guidance.prompt, self.host.language_model
        kept = keep_top(ranking, tuple(max(1, int(n * share)) for n in guidance.counts))
        stays = prompt.real.clone()
        for row, image in enumerate(prompt.images):
            stays[image.row, image.slots] = False
            stays[image.row, image.slots[kept.index[row, : kept.counts[row]].cpu()]] = True
        short = Subset.of(stays, tuple(stays.sum(1).tolist()))
        new = guidance.answer.shape[1] - 1
        said = model.embed_tokens(guidance.answer[:, :new]).to(prompt.embeds.dtype)
        length = stays.shape[1]
        positions = prompt.positions
        if positions is None:
            positions = torch.arange(length, device=said.device)[None]
        columns = short.columns.clamp(min=0).expand(*positions.shape[:-2], *short.columns.shape)
        positions = positions.expand(*positions.shape[:-2], len(stays), -1)
        tail = positions[..., -1:] + torch.arange(1, new + 1, device=said.device)
        planes = [nn.functional.pad(short.take(plane), (0, 0, 0, new)) for plane in prompt.planes]
        hidden = model(
            **self.host.with_planes(planes),
            inputs_embeds=torch.cat([short.take(prompt.embeds), said], 1),
            attention_mask=torch.cat([short.own_mask, guidance.valid[:, :new].long()], 1),
            position_ids=torch.cat([positions.gather(-1, columns), tail], -1),
            use_cache=False,
        ).last_hidden_state
        logits = self.model.lm_head(hidden[:, -new - 1 :])
        log_probs = logits.log_softmax(-1, dtype=torch.float32)
        log_probs = log_probs.gather(-1, guidance.answer[..., None])[..., 0]
        return (log_probs * guidance.valid).sum(1).exp()

    def _prepared(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The prompt on the guide's device, padded on the left, which is where `generate` wants it.

        Raises:
            UnsupportedError: when the call does not hold the whole prompt.
        """
        shown = ("pixel_values", "pixel_values_videos")
        name = "input_ids" if inputs.get("input_ids") is None else shown[0]
        if name == "input_ids" or all(inputs.get(pixels) is None for pixels in shown):
            raise UnsupportedError(
                f"The guide answers the whole prompt itself: pass {name}, not something "
                "computed from it."
            )
        weight = self.model.get_input_embeddings().weight
        prompt = {  # without weights, what has values keeps them
            name: value.to(
                value.device if weight.is_meta else weight.device,
                weight.dtype if value.is_floating_point() else None,
            )
            for name, value in inputs.items()
            if isinstance(value, Tensor) and name not in _NOT_THE_PROMPT
        }
        mask = prompt.get("attention_mask")
        if mask is None or mask.is_meta:
            return prompt
        if mask.ndim != 2:
            raise UnsupportedError("The guide needs to know the padding: pass a 2-D mask.")
        order = (mask != 0).long().argsort(dim=1, stable=True)
        return {  # the marks of what is a picture move along
            name: value.gather(1, order) if value.shape == mask.shape else value
            for name, value in prompt.items()
        }

    def _generate(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Greedy answers [batch, new] and their logits [batch, new, vocabulary]."""
        out = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1,
            num_return_sequences=1, use_cache=True, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)

    def _steps(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The same without values, which cannot say where an answer ends: it has full length."""
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        logits = [out.logits]
        for _ in range(self.max_new_tokens - 1):
            token = logits[-1].argmax(-1)
            out = self.model(input_ids=token, past_key_values=out.past_key_values)
            logits.append(out.logits)
        joined = torch.cat(logits, 1)
        return joined.argmax(-1), joined

    def _valid(self, answer: Int[Tensor, "batch new"]) -> Bool[Tensor, "batch new"]:
        """Everything up to the first end of sequence."""
        eos = self.model.generation_config.eos_token_id
        if eos is None or answer.is_meta:
            return torch.ones_like(answer, dtype=torch.bool)
        ends = torch.isin(answer, torch.as_tensor(eos, device=answer.device)).long()
        return ends.cumsum(1) - ends == 0


@operates(GuidedReducer)
@block
def guided(
    method: GuidedReducer, model: PreTrainedModel, placeholders: Tensor | None = None
) -> Iterator[Trace]:
    """Run a model whose tokens a guide ranks; see `Method.on`.

    Raises:
        UnsupportedError: no guide, or one that does not fit the model.
    """
    guide = method.guide
    if guide is None:
        raise UnsupportedError(
            f"{method.key} needs a small model to guide the large one: "
            f"use {type(method).__name__}(...).guided_by(small_model)."
        )
    if not isinstance(guide, Guide):
        guide = Guide(guide.model, guide.name, guide.max_new_tokens)
    guide.check(model)
    heard = threading.local()  # `prompt`: the running thread's; `guidance`: what was said of it
    host = host_for(model)

    def listen(module: FamilyModule, args: tuple, kwargs: dict) -> None:
        given = given_prompt(host.model) if host.behind_projector else None
        heard.prompt = given or dict(arguments_of(module, args, kwargs))
        heard.guidance = None

    def ask(view: LayerView) -> Guidance:
        guidance = heard.guidance
        if guidance is None:
            guidance = guide(heard.prompt, placeholders)
            guidance = guidance.each(len(view.hidden) // len(heard.prompt["input_ids"]))
            heard.guidance = guidance
        if view.chosen is not None:
            guidance = guidance.of(list(view.chosen))
        if guidance.counts != view.counts:
            raise UnsupportedError(
                f"The guide ranks {list(guidance.counts)} visual tokens and the model has "
                f"{list(view.counts)} left: put no other method before {method.key}."
            )
        return guidance

    # A method that works, with the current prompt within reach; the block owns both.
    handle = host.inner.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        with operate(replace(method, ask=ask), model, placeholders) as trace:
            yield trace
    finally:
        handle.remove()


# -- reading the guide -----------------------------------------------------------------------------


@dataclass
class _Seen:
    """What went into one layer's attention, pass by pass."""

    hidden: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    rotary: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def joined(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        hidden, batch = torch.cat(self.hidden, 1), len(self.hidden[0])
        cos, sin = (
            torch.cat([p.expand(batch, -1, -1) if len(p) == 1 else p for p in parts], -2)
            for parts in zip(*self.rotary, strict=True)
        )
        return hidden, torch.cat(self.keys, 1), (cos, sin)


class _Reader:
    """Hooks on a decoder that keep what its attention is made of."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.layers = [_Seen() for _ in host.language_model.layers]
        self.embeds: list[Tensor] = []
        self.positions: list[Tensor | None] = []
        self.planes: list[Tensor] = []
        self.handles: list[Any] = []
        self.thread = threading.get_ident()

    def __enter__(self) -> _Reader:
        decoder = self.host.language_model
        self._before(decoder, self._see_prompt)
        for layer, seen in zip(decoder.layers, self.layers, strict=True):
            self._before(layer.self_attn, _see_attention(seen))
            keep = self._own(_see_keys(seen))
            self.handles.append(layer.self_attn.k_proj.register_forward_hook(keep))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, module: nn.Module, hook: Any) -> None:
        self.handles.append(module.register_forward_pre_hook(self._own(hook), with_kwargs=True))

    def _own(self, hook: Any) -> Any:
        """The same for the running thread's passes only."""
        return lambda *args: hook(*args) if threading.get_ident() == self.thread else None

    def _see_prompt(self, module: FamilyModule, args: tuple, kwargs: dict) -> None:
        if not self.embeds:
            self.embeds.append(kwargs["inputs_embeds"])
            self.positions.append(kwargs.get("position_ids"))
            self.planes = self.host.planes(kwargs)[1]


def _see_attention(seen: _Seen) -> Any:
    def hook(module: FamilyModule, args: tuple, kwargs: dict) -> None:
        seen.hidden.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        seen.rotary.append(kwargs["position_embeddings"])

    return hook


def _see_keys(seen: _Seen) -> Any:
    def hook(module: FamilyModule, args: tuple, output: Tensor) -> None:
        seen.keys.append(output)

    return hook


def _queries(
    images: list[ImageLayout], length: int, valid: Bool[Tensor, "batch new"]
) -> tuple[Int[Tensor, " queries"], Bool[Tensor, "batch sources queries"]]:
    """The positions whose attention counts, and for which source of which prompt each does."""
    first = torch.full((len(valid), 1), length)
    for image in images:  # the released code sums rows from the last visual token on, inclusive
        first[image.row] = image.slots[-1]
    new = valid.shape[1] - 1  # the last token is never fed back
    queries = torch.arange(int(first.min()), length + new)
    behind = ((queries >= first) & (queries < length)).to(valid.device)
    queries = queries.to(valid.device)
    last = behind & (queries == length - 1)
    fed = torch.cat([torch.zeros_like(behind[:, : len(queries) - new]), valid[:, 1:]], 1)
    return queries, torch.stack([last, behind, fed], 1)


def _by_image(
    received: Float[Tensor, "layers batch sources keys"], images: list[ImageLayout]
) -> Float[Tensor, "layers sources images visual"]:
    each = [
        received[:, image.row][..., image.slots.to(received.device)].permute(2, 0, 1)
        for image in images
    ]
    joined = nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=-1.0)
    return joined.permute(2, 3, 0, 1)


def _vocabulary(model: FamilyModule) -> tuple[int, int]:
    return model.config.get_text_config().vocab_size, model.config.image_token_id


def _tiling(model: FamilyModule) -> tuple[str, str]:
    config = model.config
    return config.model_type, str(getattr(config, "image_grid_pinpoints", None))


def _sight(host: Host) -> str:
    return f"{host.shape.patches} tokens per crop ({host.model.config.model_type})"
