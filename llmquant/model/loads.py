"""What would transformers make of a checkpoint? Asked of transformers itself, with tensors that have no bytes.

`from_pretrained` takes a table of tensors in place of files. If they lie on the meta device, it does all that it does
with a real checkpoint (builds the class, replaces linears by packed ones, renames, merges, unpacks, initializes what no
tensor filled, ties) and allocates nothing. So no rule of its loader is written down a second time here: what it would
leave random, leave out, or fail at is what it says itself.
"""

import contextlib
import io
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from llmquant.formats.base import Layout

CODES = ".weight_packed"
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers loads tensors in threads unless this is set: slower for few
_SLACK = 32  # codes in a word of int32, at most
_AUTO = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")  # in which order classes are looked for, as users do


@dataclass(frozen=True)
class Opener:
    """A class that opens a checkpoint, with the settings that it is built by."""

    cls: Any
    settings: Any

    @property
    def name(self) -> str:
        return str(self.cls.__name__)


@dataclass(frozen=True)
class Loaded:
    """What `from_pretrained` says of a table of tensors.

    missing      parameters that no tensor fills: their values would be random
    unexpected   tensors, by their names in the model, that fill nothing
    misfits      parameters for which there is a tensor of another shape
    failed       parameters whose tensors cannot be merged or unpacked, and why
    unpacked     tensors of codes that become dense while they are loaded, and the bits and group size (-1: a row) that
                 they are taken to have
    error        what it raised; "" where it came to an end
    """

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    misfits: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)
    unpacked: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    error: str = ""


def openers(config: Mapping[str, Any], own_class: Callable[[str], Any] | None = None) -> list[Opener]:
    """The classes by which users open a checkpoint with this config.json; the first is the one that it names.

    That is the class of `architectures`, then the one of AutoModelForCausalLM, or of the next Auto class that knows the
    model. own_class: finds a class of the checkpoint's own code by its reference in `auto_map`. Empty where
    transformers has none.
    """
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    config = dict(config)
    auto_map = config.get("auto_map") if own_class is not None else None
    own = auto_map if isinstance(auto_map, dict) else {}
    if own_class is not None and "AutoModelForCausalLM" in own:
        settings = _settings(config, own_class(own["AutoConfig"]) if "AutoConfig" in own else None)
        return [Opener(own_class(own["AutoModelForCausalLM"]), settings)]
    settings = _settings(config, None)
    if settings is None:
        return []
    found = []
    architectures = config.get("architectures")
    cls = _model_class(architectures[0]) if isinstance(architectures, list) and architectures else None
    if cls is not None and isinstance(settings, cls.config_class):
        found.append(Opener(cls, settings))
    for kind in _AUTO:
        table = getattr(transformers, f"MODEL_FOR_{kind}_MAPPING")
        if type(settings) in table:
            cls = _get_model_class(settings, table)
            found.append(Opener(cls, _settings_for(cls, settings)))
            break
    return found[:1] if len(found) > 1 and found[0].cls is found[1].cls else found


def _settings(config: dict[str, Any], config_class: Any) -> Any:
    """The config as transformers reads it from a file; None where it does not know the type."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = PreTrainedConfig._decode_special_floats(config)
    if config_class is not None:
        return config_class.from_dict(config)
    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    return AutoConfig.for_model(**config)


def _model_class(name: Any) -> Any:
    """transformers' class of this name; None where it has none, or none that models are built by."""
    import transformers

    found = None
    with contextlib.suppress(ImportError):  # one that needs a package which is not installed
        found = getattr(transformers, str(name), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and getattr(found, "config_class", None) is not None else None


def _settings_for(cls: Any, settings: Any) -> Any:
    """What the Auto classes give to `cls`: a text class gets the text part, with the quantization of the whole."""
    part = settings.sub_configs.get("text_config")
    if part is None or getattr(cls, "config_class", None) is not part:
        return settings
    text = settings.get_text_config()
    if (quantization := getattr(settings, "quantization_config", None)) is not None:
        text.quantization_config = quantization
    return text


def load_empty(opener: Opener, layout: Layout) -> Loaded:
    """`from_pretrained` of tensors with these names, dtypes and shapes, and no bytes."""
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
    told: list[Any] = []
    model, error = None, ""
    with _on_meta(told.append):
        try:
            model = opener.cls.from_pretrained(
                None, config=opener.settings, state_dict=tensors, device_map={"": "meta"}, ignore_mismatched_sizes=True
            )
        except Exception as raised:  # what goes wrong depends on the class, and is the answer
            error = " ".join(f"{type(raised).__name__}: {raised}".split())[:200]
    if not told:
        return Loaded(error=error or "transformers did not report what it loaded")
    info = told[-1]
    dense, schemes = (set(), {}) if model is None else _unpacked(model, layout)
    return Loaded(
        frozenset(info.missing_keys),
        frozenset(info.unexpected_keys),
        frozenset(name for name, got, want in info.mismatched_keys if not (name in dense and _fits(got, want))),
        {
            name: text.strip().partition("\nError:")[0].rpartition("\n")[2]
            for name, text in info.conversion_errors.items()
        },
        schemes,
        error,
    )


def _fits(got: Sequence[int], want: Sequence[int]) -> bool:
    """Whether the shape of a linear that was unpacked without bytes may be right. It is found by the words that hold a
    row, and so too long by the room in the last one."""
    return len(got) == len(want) and all(0 <= have - need < _SLACK for have, need in zip(got, want, strict=True))


def _unpacked(model: Any, layout: Layout) -> tuple[set[str], dict[str, tuple[int, int]]]:
    """The parameters that became dense as `layout` was loaded, and `Loaded.unpacked`: by the rules that were used."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    codes, known = [name for name in layout if name.endswith(CODES)], model.state_dict()
    if len(codes) == sum(name.endswith(CODES) for name in known):
        return set(), {}
    rules = model._weight_conversions
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    params, schemes = set(), {}
    for name in codes:
        param, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        scheme = None if pattern is None else _scheme_of(by_pattern[pattern])
        if scheme is not None:
            params.add(param)
            schemes[name] = scheme
    return params, schemes


def _scheme_of(converter: Any) -> tuple[int, int] | None:
    """The one scheme by which a rule of the loader unpacks what it gathers; None where it unpacks nothing."""
    from transformers.integrations.compressed_tensors import get_dense_scheme, get_experts_scheme

    for operation in converter.operations:
        if (quantizer := getattr(operation, "hf_quantizer", None)) is not None:
            merges = any("." in pattern for pattern in converter.source_patterns)
            config = quantizer.compressor.quantization_config
            weights = (operation.scheme or (get_experts_scheme if merges else get_dense_scheme)(config)).weights
            return weights.num_bits, weights.group_size or -1
    return None


@contextmanager
def _on_meta(report: Callable[[Any], object]) -> Iterator[None]:
    """No tensor leaves the meta device, where a few rules want it on the CPU, and nobody asks the Hub. What would be
    printed of the load goes to `report`; progress bars and warnings of a trial go nowhere."""
    import transformers.core_model_loading as core

    def copied(rule: Any) -> Any:
        """One for each parameter, as in the load itself, which collects that one's tensors. All else is the rule's own:
        a deep copy of 50,000 rules takes half of the trial."""
        new = copy(rule)
        new.collected_tensors, new.layer_targets = defaultdict(list), defaultdict(set)
        return new

    kept = core.deepcopy, core._materialize_copy
    core.deepcopy = copied
    core._materialize_copy = lambda tensor, device=None, dtype=None: tensor.to(dtype=dtype)
    try:
        with quiet(report):
            yield
    finally:
        core.deepcopy, core._materialize_copy = kept


@contextmanager
def quiet(report: Callable[[Any], object] = lambda info: None) -> Iterator[None]:
    """A load by transformers of which nothing is printed, in this thread, without a question to the Hub. What it would
    print of the tensors goes to `report`."""
    import transformers.modeling_utils as utils
    from huggingface_hub import constants
    from loguru import logger
    from transformers.utils import logging

    kept = utils.log_state_dict_report, logging.get_verbosity(), constants.HF_HUB_OFFLINE
    utils.log_state_dict_report = lambda *args, **kwargs: report(kwargs["loading_info"])
    constants.HF_HUB_OFFLINE = True
    threads = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    logging.set_verbosity(logging.CRITICAL)
    logger.disable("compressed_tensors")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        utils.log_state_dict_report, verbosity, constants.HF_HUB_OFFLINE = kept
        if threads is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = threads
        logging.set_verbosity(verbosity)
        logger.enable("compressed_tensors")
