"""The trajectory file's contract as data: every dataset, its dimensions, type, unit and meaning.

A dataset is optional, but where it is present it has exactly this meaning. Groups that hold one row per
step carry their own `step` coordinate. Unknown groups are left alone. `docs/trajectory.md` says the same
in words and a test holds the two together.
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote

SCHEMA_VERSION = (1, 1)
"""Major, minor. A reader refuses a newer major version and reads any minor one."""


@dataclass(frozen=True)
class Field:
    """One dataset: its path in the file, named dimensions, dtype, unit, meaning, and the command that makes it."""

    path: str
    dims: tuple[str, ...]
    dtype: str
    units: str
    long_name: str
    made_by: str | None = None

    @property
    def fill(self) -> float | int | bytes:
        """What an unmeasured cell holds: NaN for floats, the largest value for unsigned, -1 for signed integers."""
        kind = self.dtype[0]
        if kind == "f":
            return float("nan")
        if kind == "u":
            return 2 ** (8 * int(self.dtype[1:])) - 1
        return b"" if kind == "S" else -1


def _fields(*fields: Field) -> dict[str, Field]:
    return {field.path: field for field in fields}


ATTRIBUTES = {
    **dict.fromkeys(("schema_version", "state", "task", "task_source", "task_sha256", "command", "title"), str),
    **dict.fromkeys(
        ("opsig_version", "python_version", "torch_version", "jax_version", "device", "git_commit", "loss_unit"), str
    ),
    "pictures_sha256": str,
    **dict.fromkeys(("parent", "parent_path", "change"), str),
    "from_step": int,
    "settings_json": dict,
    "change_json": dict,
    "effects_json": list,
    "part_json": dict,
}
"""Root attributes that opsig writes, and what they are; names that end in `_json` hold JSON."""

ROW_CHECKSUM = "exclusive or, over the row's measured columns, of crc32(column name, bytes of the row)"

WIDE_CHECKSUM = "the part of checksum that is of columns with a value for every parameter or sample"
SIGHTING_CHECKSUM = "the same of each sighting: of its step, sample, and what is known of loss and prediction"

_FIRST_OF_THREE = "t of (theta_t + 2 theta_t+1 + theta_t+2) / 4, the floor of the valley that is measured"
_FLOOR = (
    Field("floor/step", ("step",), "i8", "1", _FIRST_OF_THREE),
    Field("floor/checksum", ("step",), "u4", "1", ROW_CHECKSUM),
    Field("floor/wide_checksum", ("step",), "u4", "1", WIDE_CHECKSUM),
    Field("floor/eigenvalue", ("step", "rank"), "f8", "nat", "largest eigenvalues of the training loss's Hessian"),
    Field("floor/residual", ("step", "rank"), "f8", "1", "|Hv - lambda v| / |lambda| of each eigenpair"),
    Field("floor/products", ("step",), "i4", "1", "Hessian-vector products that the solve took"),
    Field("floor/threshold", ("step",), "f8", "nat", "sharpness at which the optimizer loses stability"),
    Field("floor/layer_fraction", ("step", "tensor"), "f8", "1", "share of the first eigenvector's squared norm"),
    Field("floor/eigenvector", ("step", "parameter"), "f4", "1", "first eigenvector, of unit length"),
    Field("preconditioned_floor/step", ("step",), "i8", "1", _FIRST_OF_THREE),
    Field("preconditioned_floor/checksum", ("step",), "u4", "1", ROW_CHECKSUM),
    Field(
        "preconditioned_floor/eigenvalue", ("step", "rank"), "f8", "nat",
        "largest eigenvalues of P^-1/2 H P^-1/2, P of Adam",
    ),
    Field("preconditioned_floor/residual", ("step", "rank"), "f8", "1", "|Hv - lambda v| / |lambda| of each eigenpair"),
    Field("preconditioned_floor/products", ("step",), "i4", "1", "Hessian-vector products that the solve took"),
    Field(
        "preconditioned_floor/threshold", ("step",), "f8", "nat",
        "preconditioned sharpness at which Adam loses stability",
    ),
    Field("slopes/step", ("step",), "i8", "1", "the checkpoint; at the floor, as floor/step"),
    Field("slopes/checksum", ("step",), "u4", "1", ROW_CHECKSUM),
    Field("slopes/wide_checksum", ("step",), "u4", "1", WIDE_CHECKSUM),
    Field("slopes/at_floor", ("step",), "i4", "1", "1 where measured at the floor, 0 at the iterate"),
    Field("slopes/eigenvalue", ("step", "rank"), "f8", "nat", "largest eigenvalues of what decides stability"),
    Field("slopes/residual", ("step", "rank"), "f8", "1", "|Hv - lambda v| / |lambda| of each eigenpair"),
    Field("slopes/threshold", ("step",), "f8", "nat", "sharpness at which the optimizer loses stability"),
    Field(
        "slopes/slope", ("step", "rank", "sample"), "f4", "nat",
        "v'g of every sample along each eigenvector (for Adam along P^-1/2 v)",
    ),
    Field(
        "slopes/curvature", ("step", "rank", "sample"), "f4", "nat",
        "v'Hv of every sample's Hessian; its mean over samples is the eigenvalue",
    ),
)  # fmt: skip
# "S*" is a fixed-length UTF-8 string as wide as the longest value, and "S64" one of 64 bytes; "u1|i4" is u1 where 254
# classes suffice, and "f4|u2" is float32 or, as u2, the bits of bfloat16.
FIELDS = _fields(
    Field("sample", ("sample",), "i8", "1", "index of the sample in the task's dataset"),
    Field("class_name", ("class",), "S*", "1", "name of the class that a prediction's integer stands for"),
    Field("samples/label", ("sample",), "S*", "1", "label of the sample, as a person reads it"),
    Field("samples/name", ("sample",), "S*", "1", "name of the sample in the log that it was imported from"),
    Field("samples/thumbnail", ("sample", "row", "column", "channel"), "u1", "1", "small picture of the sample"),
    Field("samples/vector", ("sample", "number"), "f4", "1", "the sample's input, of which figures draw a plot"),
    Field("samples/weight", ("sample",), "f8", "1", "weight of the sample's loss in what a branch minimises"),
    Field("samples/text", ("sample",), "S*", "1", "the sample as text"),
    Field("samples/target", ("sample",), "u1", "1", "1 where the sample has a loss; where it never has, it is NaN"),
    Field("samples/truth", ("sample",), "i4", "1", "planted side: 2*pair + side, or -1 outside every group"),
    Field("samples/feature", ("sample",), "i4", "1", "planted feature, which two pairs may share, or -1 for none"),
    Field("scalars/step", ("step",), "i8", "1", "optimizer steps taken before the row was measured"),
    Field("scalars/checksum", ("step",), "u4", "1", ROW_CHECKSUM),
    Field(
        "scalars/train_loss", ("step",), "f8", "nat", "mean training loss (over the minibatch for minibatch methods)"
    ),
    Field("scalars/learning_rate", ("step",), "f8", "1", "learning rate of the step that follows"),
    Field("scalars/grad_norm", ("step",), "f8", "1", "Euclidean norm of the gradient of the training loss"),
    Field(
        "scalars/update_norm", ("step",), "f8", "1", "Euclidean norm of the parameter change of the step that follows"
    ),
    Field("scalars/signed_fraction", ("step",), "f8", "1", "share of the parameters that SplitSGD moves by the sign"),
    Field("scalars/momentum", ("step",), "f8", "1", "heavy-ball momentum of the step that follows"),
    Field("scalars/beta1", ("step",), "f8", "1", "Adam's beta1 of the step that follows"),
    Field("scalars/beta2", ("step",), "f8", "1", "Adam's beta2 of the step that follows"),
    Field("logged/step", ("step",), "i8", "1", "optimizer steps taken before the row was measured"),
    Field("logged/checksum", ("step",), "u4", "1", ROW_CHECKSUM),
    Field("logged/*", ("step",), "f8", "1", "any other number of a training loop's own, under the name it gave"),
    Field("losses/step", ("step",), "i8", "1", "optimizer steps taken before the row was measured"),
    Field("losses/checksum", ("step",), "u4", "1", ROW_CHECKSUM),
    Field("losses/loss", ("step", "sample"), "f4", "nat", "loss of every sample", "opsig track"),
    Field("losses/prediction", ("step", "sample"), "u1|i4", "1", "predicted class of every sample", "opsig track"),
    Field("sightings/step", ("sighting",), "i8", "1", "optimizer steps taken before the sample was seen in a batch"),
    Field("sightings/sample", ("sighting",), "i8", "1", "index of the sample in the task's dataset"),
    Field("sightings/loss", ("sighting",), "f4", "nat", "loss of the sample then; NaN where it is not known"),
    Field("sightings/prediction", ("sighting",), "u1|i4", "1", "predicted class of the sample then"),
    Field("sightings/checksum", ("sighting",), "u4", "1", SIGHTING_CHECKSUM),
    Field("checkpoints/step", ("step",), "i8", "1", "optimizer steps taken before the checkpoint"),
    Field("checkpoints/checksum", ("step",), "u4", "1", ROW_CHECKSUM),
    Field("checkpoints/params", ("step", "parameter"), "f4|u2", "1", "trained parameters, flattened in layout order"),
    Field("checkpoints/buffers", ("step", "buffer"), "f8", "1", "all buffers of the model, flattened in layout order"),
    Field("checkpoints/optimizer/momentum_buffer", ("step", "parameter"), "f4", "1", "heavy-ball momentum"),
    Field("checkpoints/optimizer/exp_avg", ("step", "parameter"), "f4", "1", "Adam's first moment"),
    Field("checkpoints/optimizer/exp_avg_sq", ("step", "parameter"), "f4", "1", "Adam's second moment"),
    Field("checkpoints/optimizer/radius", ("step",), "f8", "1", "size beyond which SplitSGD goes by the sign"),
    Field("checkpoints/source/path", ("step",), "S512", "1", "file or folder that the checkpoint was imported from"),
    Field("checkpoints/source/bytes", ("step",), "i8", "byte", "size of its weights' files"),
    Field("checkpoints/source/sha256", ("step",), "S64", "1", "SHA-256 of its weights' files in order of name"),
    Field("checkpoints/external/path", ("step", "file"), "S512", "1", "files that hold the checkpoint"),
    Field("checkpoints/external/bytes", ("step", "file"), "i8", "byte", "size of each of these files"),
    Field("checkpoints/external/sha256", ("step", "file"), "S64", "1", "SHA-256 of each of these files"),
    Field(
        "checkpoints/external/extent",
        ("step", "field", "extent"),
        "i8",
        "1",
        "stretches of numbers: kind, place in the row, count, file, byte, type, crc32",
    ),
    Field("frozen/params", ("frozen_parameter",), "f4", "1", "parameters not trained, flattened in layout order"),
    Field("layout/name", ("tensor",), "S*", "1", "name of the parameter or buffer"),
    Field("layout/kind", ("tensor",), "S*", "1", "parameter (trained), frozen (a parameter that is not), or buffer"),
    Field("layout/shape", ("tensor", "axis"), "i8", "1", "shape, padded with -1"),
    Field("layout/offset", ("tensor",), "i8", "1", "first index in the flat row of its kind"),
    Field("layout/size", ("tensor",), "i8", "1", "number of entries"),
    Field("sharpness/step", ("step",), "i8", "1", "optimizer steps taken before the row was measured"),
    Field("sharpness/checksum", ("step",), "u4", "1", ROW_CHECKSUM),
    Field("sharpness/wide_checksum", ("step",), "u4", "1", WIDE_CHECKSUM),
    Field("sharpness/eigenvalue", ("step", "rank"), "f8", "nat", "largest eigenvalues of the training loss's Hessian"),
    Field("sharpness/residual", ("step", "rank"), "f8", "1", "|Hv - lambda v| / |lambda| of each eigenpair"),
    Field("sharpness/products", ("step",), "i4", "1", "Hessian-vector products that the solve took"),
    Field("sharpness/threshold", ("step",), "f8", "nat", "sharpness at which the optimizer loses stability"),
    Field("sharpness/layer_fraction", ("step", "tensor"), "f8", "1", "share of the first eigenvector's squared norm"),
    Field(
        "sharpness/eigenvector",
        ("step", "parameter"),
        "f4",
        "1",
        "first eigenvector, of unit length",
        "opsig sharpness --at iterate",
    ),
    Field("preconditioned/step", ("step",), "i8", "1", "optimizer steps taken before the row was measured"),
    Field("preconditioned/checksum", ("step",), "u4", "1", ROW_CHECKSUM),
    Field(
        "preconditioned/eigenvalue", ("step", "rank"), "f8", "nat", "largest eigenvalues of P^-1/2 H P^-1/2, P of Adam"
    ),
    Field("preconditioned/residual", ("step", "rank"), "f8", "1", "|Hv - lambda v| / |lambda| of each eigenpair"),
    Field("preconditioned/products", ("step",), "i4", "1", "Hessian-vector products that the solve took"),
    Field("preconditioned/threshold", ("step",), "f8", "nat", "preconditioned sharpness at which Adam loses stability"),
    *_FLOOR,
    Field("per_sample/step", ("step",), "i8", "1", "optimizer steps taken before the row was measured"),
    Field("per_sample/checksum", ("step",), "u4", "1", ROW_CHECKSUM),
    Field("per_sample/gradient_norm", ("step", "sample"), "f8", "nat", "norm of the gradient of the sample's loss"),
    Field(
        "per_sample/curvature", ("step", "sample"), "f8", "nat",
        "v'Hv of the sample's Hessian along the whole loss's top eigenvector",
    ),
    Field("per_sample/sample_sharpness", ("step", "sample"), "f8", "nat", "top eigenvalue a of the sample's Hessian"),
    Field(
        "per_sample/sample_sharpness_residual", ("step", "sample"), "f8", "1",
        "|Hu - au| over the largest size of an eigenvalue of H",
    ),
    Field("mined/kept", ("byte",), "u1", "1", "the last results of mine: a line of JSON on their origin, then each"),
    Field("clusters/kept", ("byte",), "u1", "1", "the last results of cluster, likewise"),
)  # fmt: skip

ROW_GROUPS = tuple(path.removesuffix("/step") for path, field in FIELDS.items() if path.endswith("/step")
                   and field.dims == ("step",))  # fmt: skip
"""Groups that grow by one row per recorded step."""

DIMENSIONS = (
    *(("", name) for name in ("sample", "class", "row", "column", "channel", "tensor", "axis", "parameter", "buffer")),
    ("sharpness", "rank"),
    *((group, "step") for group in ("scalars", "losses", "checkpoints", "sharpness", "preconditioned")),
    ("preconditioned", "rank"),
    ("", "frozen_parameter"),
    ("logged", "step"),
    *((group, name) for group in ("floor", "preconditioned_floor", "slopes") for name in ("step", "rank")),
    *(("checkpoints", name) for name in ("file", "field", "extent")),
    ("mined", "byte"),
    ("clusters", "byte"),
    ("sightings", "sighting"),
    ("per_sample", "step"),
    ("", "number"),
)
"""Group and name of every dimension; its place is its netCDF number. Append only."""


def is_wide(path: str) -> bool:
    """Whether a row of this dataset has a value for every parameter or sample."""
    return not {"parameter", "sample"}.isdisjoint(field_of(path).dims)


def logged_name(name: str) -> str:
    """The dataset in `logged` of a scalar of this name, what HDF5 keeps for itself written as %XX.

    >>> logged_name("val/acc"), field_of("logged/val%2Facc").long_name
    ('val%2Facc', 'val/acc')
    """
    first = "^[.]|^(?=step$|checksum$)." if name in ("step", "checksum") else "^[.]"
    return re.sub(rf"[%/*\x00-\x1f\x7f]|{first}", lambda found: f"%{ord(found[0]):02X}", name)


def field_of(path: str) -> Field:
    """The field of a dataset. Raises KeyError for what the schema does not know."""
    if path in FIELDS or not path.startswith("logged/"):
        return FIELDS[path]
    return Field(path, ("step",), "f8", "1", unquote(path.removeprefix("logged/")))


def is_known(path: str) -> bool:
    """Whether a dataset is one of the schema's."""
    return path in FIELDS or path.startswith("logged/")


def dimension(field: Field, name: str) -> tuple[str, str]:
    """The dimension of this name that the field uses: its group's own, or the root's."""
    group = field.path.split("/")[0]
    return (group, name) if (group, name) in DIMENSIONS else ("", name)


def as_table() -> str:
    """The contract as Markdown, for docs/trajectory.md."""
    lines = ["| dataset | dimensions | type | unit | meaning |", "|---|---|---|---|---|"]
    for field in FIELDS.values():
        cells = (f"`{field.path}`", ", ".join(field.dims), field.dtype, field.units, field.long_name)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
