"""Methods with modules that are trained for one model, and what such a training leaves.

What was learnt lies in a folder: `method.safetensors` holds the method's own modules (`own.NAME`),
parameters of the model itself where the method trains any (`tuned.NAME`), and a sample of the
model's weights, by which another model is told; `method.json` says what it is. The kit's own lie in
data/methods/KEY/MODEL/, covered by hashes.
"""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import huggingface_hub
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from frugalvlm.errors import FrugalError
from frugalvlm.methods.base import Method
from frugalvlm.methods.fields import RUNTIME, short
from frugalvlm.operators import operator_of
from frugalvlm.paths import data_dir, repository
from frugalvlm.trace import Trace

WEIGHTS, ABOUT, HASHES = "method.safetensors", "method.json", "SHA256SUMS.json"
SAMPLED = 16  # matrices of a model, and values of each, by which it is told from others
SAME = 0.05  # mean difference of a sample, as a share; half precision makes less than 0.004 of it


class LearntError(FrugalError, OSError):
    """Weights of a method that are missing, damaged or another model's; names the remedy."""


@dataclass(frozen=True)
class Sizes:
    """What the modules of a method may be built by: sizes of a model, from its configuration.

    Attributes:
        decoder_layers: layers of the language model.
        width: channels of its hidden states.
        heads: its attention heads.
        tower_width: channels of the patch features that the projector reads.
        patches: patch tokens of a crop; 0 where that depends on the picture.
    """

    decoder_layers: int
    width: int
    heads: int
    tower_width: int
    patches: int

    @staticmethod
    def of(model: Any) -> Sizes:
        """The sizes of a Transformers vision-language model."""
        text, vision = model.config.get_text_config(), model.config.vision_config
        width = getattr(vision, "hidden_size", 0) or getattr(vision, "embed_dim", 0)
        high, wide = (
            pixels // patch
            for pixels, patch in zip(
                _pair(getattr(vision, "image_size", 0)), _pair(vision.patch_size), strict=True
            )
        )
        return Sizes(
            text.num_hidden_layers, text.hidden_size, text.num_attention_heads, width, high * wide
        )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of what is a square, or both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True, eq=False)
class Learnt:
    """What a method has learnt for one model.

    Attributes:
        own: the method's modules.
        tuned: parameters of the model itself that were trained, too, by their names in it.
        sizes: of the model.
        sample: of its weights as they were before any training, see `sample_of`.
        model: what it is called.
        digest: names these weights, 16 hexadecimal digits.
        transfer: may be put on other models of the same sizes.
    """

    own: nn.Module
    tuned: Mapping[str, Tensor]
    sizes: Sizes
    sample: Float[Tensor, "matrices values"]
    model: str
    digest: str = "untrained"
    transfer: bool = False

    @property
    def name(self) -> str:
        """What records call it."""
        return f"{self.model}@{self.digest[:8]}"

    def check(self, key: str, model: Any) -> None:
        """Refuse a model that these weights were not made for.

        Raises:
            LearntError: says which it is, and what to do.
        """
        here = Sizes.of(model)
        for part in fields(Sizes):
            own, its = getattr(self.sizes, part.name), getattr(here, part.name)
            if own != its:
                raise LearntError(
                    f"These weights of {key} are {self.model}'s, whose {part.name} is {own}; this "
                    f"model's is {its}: load this model's own, or {train_command(key, 'NAME')}."
                )
        sample = sample_of(model)
        if self.transfer or sample.is_meta:
            return
        if not _same(self.sample, sample):
            raise LearntError(
                f"These weights of {key} are {self.model}'s, and this is another model of the same "
                f"sizes: load its own, {train_command(key, 'NAME')}, or take these on purpose with "
                "load(..., transfer=True)."
            )

    def to(self, like: Tensor) -> Learnt:
        """The same where this tensor is, and in its number format."""
        first = next(self.own.parameters(), like)
        if first.device == like.device and first.dtype == like.dtype:
            return self
        return replace(self, own=copy.deepcopy(self.own).to(like.device, like.dtype))


def sample_of(model: Any) -> Float[Tensor, "matrices values"]:
    """A few weights of a model, in float32 on the CPU: the same in any number format, or nearly."""
    named = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if p.ndim == 2}
    names = sorted(n for n in named if "lora_" not in n)
    chosen = [named[n].detach().flatten() for n in names[:: max(1, len(names) // SAMPLED)]]
    picked = [w[torch.linspace(0, len(w) - 1, SAMPLED).long().to(w.device)] for w in chosen]
    return torch.stack([w.float() if w.is_meta else w.float().cpu() for w in picked[:SAMPLED]])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().mean() <= SAME * a.abs().mean())


@dataclass(frozen=True)
class TrainedMethod(Method):
    """A method whose modules are trained for one model.

    A subclass says what its modules are (`build`) and derives from the kind that says where it
    acts, too, behind this one. Its rule reads `self.own`.

    Attributes:
        learnt: what was learnt; see `load`. None: nothing, and it cannot be put on a model.
        weights_of: key of the method whose weights it takes; "": its own.
    """

    weights_of: ClassVar[str] = ""
    learnt: Learnt | None = field(
        default=None, repr=False, compare=False, kw_only=True, metadata=RUNTIME
    )

    @abstractmethod
    def build(self, sizes: Sizes) -> nn.Module:
        """The method's modules with first weights, for a model of these sizes.

        Random numbers come from torch's global generator, which the caller seeds.
        """

    @property
    def own(self) -> Any:
        """The method's trained modules.

        Raises:
            LearntError: when there are none; says which command makes them.
        """
        return self._needed("NAME").own

    def _needed(self, model: str) -> Learnt:
        if self.learnt is None:
            raise LearntError(
                f"{self.key} has no weights yet: take what it learnt with "
                f"{type(self).__name__}.load(NAME), or {train_command(self.taught_as(), model)}."
            )
        return self.learnt

    @classmethod
    def taught_as(cls) -> str:
        """Key of the method whose weights it takes."""
        return cls.weights_of or cls.key

    def for_model(self, name: str) -> Self:
        """The same with what is installed for a model, unless it has learnt something already.

        Args:
            name: an embedded model, or the folder or Hub id of a model.

        Raises:
            LearntError: as `load`.
        """
        learnt = self.learnt or type(self).load(Path(name).name).learnt
        return replace(self, learnt=learnt)

    @classmethod
    def load(cls, source: str, *, transfer: bool = False, **more: Any) -> Self:
        """The method with what it learnt.

        Args:
            source: an embedded model, for the weights that belong to it; a folder; or a Hub id of
                the form owner/name.
            transfer: put these weights on other models of the same sizes, too.
            more: fields that are not as in training.

        Raises:
            LearntError: there are none, they are damaged, or another method's; says what to do.
        """
        key = cls.taught_as()
        folder = _folder(key, source)
        about, tensors = _read(folder, key, source)
        method = cls(**{**_plain(about["fields"]), **more})
        sizes = Sizes(**about["sizes"])
        own = method.build(sizes)
        try:
            own.load_state_dict(_part("own.", tensors))
        except RuntimeError as error:
            raise LearntError(
                f"{folder / WEIGHTS} does not fit its own {ABOUT}: {train_command(key, source)}."
            ) from error
        learnt = Learnt(
            own.eval().requires_grad_(False), _part("tuned.", tensors), sizes, tensors["sample"],
            about["model"], _digest(folder / WEIGHTS), transfer,
        )  # fmt: skip
        return replace(method, learnt=learnt)

    def on(
        self, model: PreTrainedModel, placeholders: Tensor | None = None
    ) -> AbstractContextManager[Trace]:
        """Run the model with this method inside a `with` block; see `Method.on`.

        Parameters of the model that the method has tuned hold their tuned values inside the block,
        for every user of the model.

        Raises:
            LearntError: nothing was learnt, or for another model.
        """
        if not hasattr(getattr(model, "config", None), "vision_config"):
            return operator_of(type(self))(self, model, placeholders)  # which says what it lacks
        learnt = self._needed(getattr(model, "name_or_path", "") or "NAME")
        learnt.check(self.taught_as(), model)
        ready = replace(self, learnt=learnt.to(next(model.parameters())))
        block = operator_of(type(self))(ready, model, placeholders)
        return _tuned(block, model, learnt.tuned) if learnt.tuned else block

    def __repr__(self) -> str:
        plain = short(self)
        if self.learnt is None:
            return plain
        comma = "" if plain.endswith("()") else ", "
        return f"{plain[:-1]}{comma}learnt=<{self.learnt.name}>)"

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, as records keep them; what was learnt by its name."""
        return {**super().describe(), "learnt": None if self.learnt is None else self.learnt.name}


@contextmanager
def _tuned(
    block: AbstractContextManager[Trace], model: nn.Module, tuned: Mapping[str, Tensor]
) -> Iterator[Trace]:
    """A block in which parameters of the model hold other values."""
    with ExitStack() as stack:
        for name, value in tuned.items():
            parameter = model.get_parameter(name)
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = value.to(parameter.device, parameter.dtype)
        yield stack.enter_context(block)


# -- files ---------------------------------------------------------------------------------------


def methods_dir() -> Path:
    """The folder of what the kit's methods have learnt."""
    return data_dir() / "methods"


def write_learnt(folder: Path, method: TrainedMethod, notes: Mapping[str, Any]) -> None:
    """Write what a method has learnt, its matrices in half precision.

    Args:
        folder: where to.
        method: with it.
        notes: more about it, JSON values.
    """
    learnt = method.learnt
    assert learnt is not None
    folder.mkdir(parents=True, exist_ok=True)
    half = {
        f"{prefix}.{name}": value.detach().to("cpu", torch.float16).contiguous()
        for prefix, part in (("own", learnt.own.state_dict()), ("tuned", learnt.tuned))
        for name, value in part.items()
    }
    save_file({**half, "sample": learnt.sample}, folder / WEIGHTS)
    own = {f.name: getattr(method, f.name) for f in fields(method) if not f.metadata.get("runtime")}
    about = {
        "method": method.key, "model": learnt.model, "fields": own, "sizes": asdict(learnt.sizes),
        **notes,
    }  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def write_learnt_hashes(folder: Path) -> None:
    """Cover the files that loading reads; the card is free."""
    hashes = {name: _sha256(folder / name) for name in (WEIGHTS, ABOUT)}
    (folder / HASHES).write_text(json.dumps(hashes, indent=1) + "\n")


def train_command(key: str, model: str) -> str:
    """Which command makes weights, as part of a sentence."""
    where = "" if repository() else " in a clone of the kit"
    name = Path(model).name or "NAME"
    return f"train it with `invoke train --method {key} --model {name}`{where}"


def _folder(key: str, source: str) -> Path:
    installed = methods_dir() / key / source
    if Path(source).name == source and installed.is_dir():
        return installed
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") == 1 and not source.startswith("."):
        return _fetched(key, source)
    raise LearntError(f"{key} has no weights for {source}: {train_command(key, source)}.")


def _fetched(key: str, source: str) -> Path:
    """The files of a Hub repository."""
    try:
        paths = [huggingface_hub.hf_hub_download(source, name) for name in (WEIGHTS, ABOUT)]
    except Exception as error:  # whatever the HTTP library calls its failures
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LearntError(
            f"Cannot fetch the weights of {key} from '{source}' ({first}): run `hf download "
            f"{source}` on a machine with internet access and pass the folder, or "
            f"{train_command(key, 'NAME')}."
        ) from error
    return Path(paths[0]).parent


def _read(folder: Path, key: str, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the files of a folder hold, checked."""
    remedy = train_command(key, source)
    _verify(folder, remedy)
    try:
        about, tensors = json.loads((folder / ABOUT).read_text()), load_file(folder / WEIGHTS)
        found = [about[name] for name in ("method", "model", "fields", "sizes")]
        found.append(tensors["sample"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise LearntError(f"The files in {folder} cannot be read ({error}): {remedy}.") from error
    if about["method"] != key:
        raise LearntError(f"{folder} holds weights of {about['method']}, not of {key}: {remedy}.")
    return about, {k: v.float() for k, v in tensors.items()}


def _verify(folder: Path, remedy: str) -> None:
    """Files that are there, and are what was written; a folder of another origin has no hashes."""
    for name in (WEIGHTS, ABOUT):
        if not (folder / name).is_file():
            raise LearntError(f"{folder} holds no {name}: {remedy}.")
    sums = folder / HASHES
    if not sums.is_file() and methods_dir() not in folder.absolute().parents:
        return
    try:
        hashes = json.loads(sums.read_text())
        whole = all(hashes[name] == _sha256(folder / name) for name in (WEIGHTS, ABOUT))
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise LearntError(f"The files in {folder} differ from their recorded hashes: {remedy}.")


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of JSON as the tuples that fields hold."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _digest(path: Path) -> str:
    return _sha256(path)[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def untrained(method: TrainedMethod, model: Any) -> Learnt:
    """First weights of a method for a model, for what does not depend on what is learnt."""
    sizes = Sizes.of(model)
    like = model.get_input_embeddings().weight
    own = method.build(sizes).to(like.device, like.dtype)
    return Learnt(own, {}, sizes, sample_of(model), "untrained", transfer=True)
