"""What is known of each output format, as data: read by the recipe, the lint, the card, `doctor` and README's tables.

Nothing here imports torch: `llmquant --help` and shell completion read these facts and must not wait for it. How the
bytes lie is code, one file for each format beside this one; `Format.facts` ties the two together.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

WIDTHS = (2, 3, 4, 8)  # bits of a code
GROUPS = (32, 64, 128, -1)  # weights that share a scale; -1: a whole row
DEFAULT = "compressed-tensors"
# Linears that vLLM and SGLang run as one matrix, by its name: all members quantized alike, or none.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Facts:
    """One format.

    title         what a card calls it
    bits          widths of a code that it holds
    groups        group sizes that it holds, of those that a recipe may name
    zero_points   widths at which it holds asymmetric grids; empty: symmetric grids only
    dense         it holds the dequantized weights in the checkpoint's own dtype, and no codes
    exportable    its codes, scales and zeros can be read back as the grid that they were
    mixes         how it says that linears differ in their schemes; "": all linears have one scheme
    conv1d        it holds Conv1D layers (GPT-2), whose weights are transposed
    in_multiple, out_multiple   what in_features and out_features must be divisible by
    opened_by     (module, package) that opens it, for `doctor`
    packages      what transformers needs beside itself to open it, for the card
    library       `library_name` on the Hub
    one_file      config, tokenizer and weights are one file, with no config.json beside it
    remote_code   a model that brings its own Python code can be opened in it
    fused         servers fuse its q, k, v and gate, up (FUSED): the members must be alike
    one_scheme_in runtimes that open it only where all linears have one scheme
    outside       options whose matrices outside the blocks it holds quantized
    patterns      its list of what stays dense takes patterns of names
    tried         what can be tried of its loading in transformers before there are weights: all; names (which the dense
                  tensors have: what it does with packed ones, its kernels' packages decide); or nothing
    """

    title: str
    bits: tuple[int, ...] = WIDTHS
    groups: tuple[int, ...] = GROUPS
    zero_points: tuple[int, ...] = ()
    dense: bool = False
    exportable: bool = False
    mixes: str = ""
    conv1d: bool = False
    in_multiple: int = 1
    out_multiple: int = 1
    opened_by: tuple[str, str] = ("transformers", "transformers")
    packages: tuple[str, ...] = ()
    library: str = "transformers"
    one_file: bool = False
    remote_code: bool = True
    fused: bool = False
    one_scheme_in: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    patterns: bool = False
    tried: str = ""

    def why_unfit(self, rows: int, columns: int) -> str:
        """Why it cannot hold a linear of this shape, whatever the scheme; "" where it can."""
        if columns % self.in_multiple == 0 and rows % self.out_multiple == 0:
            return ""
        return f"{rows} outputs, {columns} inputs, no multiples of {self.out_multiple} and {self.in_multiple}"


FACTS: dict[str, Facts] = {
    "compressed-tensors": Facts(
        "compressed-tensors, pack-quantized",
        # Its loader opens asymmetric grids only where the config says "dequantize", and then one group of them.
        exportable=True,
        mixes="one of config_groups for each scheme, with the names of its modules",
        opened_by=("compressed_tensors", "compressed-tensors"),
        packages=("compressed-tensors",),
        fused=True,
        outside=("lm_head_bits",),
        patterns=True,
        tried="all",
    ),
    "gptq": Facts(
        "GPTQ, version 1",
        bits=(4, 8),
        exportable=True,
        mixes="patterns of module names in `dynamic`",
        one_scheme_in=("transformers",),
        in_multiple=32,  # what its kernels in transformers ask of both sides
        out_multiple=32,
        opened_by=("gptqmodel", "gptqmodel"),
        packages=("optimum", "gptqmodel"),
        fused=True,
        tried="names",
    ),
    "awq": Facts(
        "AWQ, version gemm",
        bits=(4,),
        zero_points=(4,),
        exportable=True,
        out_multiple=8,
        opened_by=("gptqmodel", "gptqmodel"),
        packages=("gptqmodel",),
        fused=True,
        tried="names",
    ),
    "mlx": Facts(
        "MLX, affine",
        groups=(32, 64, 128),
        zero_points=WIDTHS,
        mixes="an entry for each module in `quantization`",
        in_multiple=32,
        opened_by=("mlx", "mlx-lm"),
        outside=("lm_head_bits", "embed_bits"),
        library="mlx",
        remote_code=False,
    ),
    "gguf": Facts(
        "GGUF of Q4_0, Q4_1 and Q8_0 blocks",
        bits=(4, 8),
        zero_points=(4,),
        mixes="a type for each tensor",
        outside=("lm_head_bits", "embed_bits"),
        conv1d=True,
        in_multiple=32,
        packages=("gguf",),
        library="gguf",
        one_file=True,
        remote_code=False,
    ),
    "fake": Facts(
        "dense weights of the checkpoint's own dtype",
        zero_points=WIDTHS,
        dense=True,
        mixes="dense weights need no scheme",
        outside=("lm_head_bits", "embed_bits"),
        conv1d=True,
        tried="all",
    ),
}


def formats_that(fit: Callable[[Facts], bool]) -> tuple[str, ...]:
    """Names of the formats whose facts `fit`, in the order of FACTS.

    >>> formats_that(lambda facts: bool(facts.zero_points))
    ('awq', 'mlx', 'gguf', 'fake')
    """
    return tuple(name for name, facts in FACTS.items() if fit(facts))


def fused_names(leaves: Iterable[str]) -> list[str]:
    """What servers call the matrices all of whose members are among `leaves`.

    >>> fused_names(["q_proj", "k_proj", "v_proj", "up_proj"])
    ['qkv_proj']
    """
    known = set(leaves)
    return [name for name, members in FUSED.items() if known.issuperset(members)]


def fused_sets(modules: Iterable[str]) -> list[list[str]]:
    """The modules that servers run as one matrix, set by set, in the order of FUSED; those with two members or more.

    >>> fused_sets(["a.0.up_proj", "a.0.down_proj", "a.0.gate_proj", "a.1.up_proj"])
    [['a.0.gate_proj', 'a.0.up_proj']]
    """
    known = dict.fromkeys(modules)
    parents = dict.fromkeys(module.rpartition(".")[0] for module in known)
    sets = [[f"{parent}.{leaf}" for leaf in leaves] for parent in parents for leaves in FUSED.values()]
    present = [[member for member in members if member in known] for members in sets]
    return [members for members in present if len(members) > 1]


# The second of a pair of linears: servers give each device a part of its inputs, and add up the outputs.
_BY_INPUTS = frozenset(("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "w2", "c_proj"))


def is_split_by_inputs(module: str) -> bool:
    """Whether tensor parallelism gives each device a part of the linear's inputs, with all groups of them.

    >>> is_split_by_inputs("model.layers.0.mlp.down_proj"), is_split_by_inputs("model.layers.0.mlp.up_proj")
    (True, False)
    """
    return module.rpartition(".")[2] in _BY_INPUTS
