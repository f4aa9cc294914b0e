"""The configuration as one tree of dataclasses: every key, its default, its meaning and unit, and the rules between keys.

The published 3DINO keys keep their names and defaults; keys of ours sit beside them and default to what the paper did.
`ssl3d_default_config.yaml` is generated from this file (`dinov2 config show`), and a test holds the two equal.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from dinov2.configs.errors import ConfigError, nearest
from dinov2.geometry import triple

ARCH_SHAPES = {  # embed_dim, depth, num_heads
    "vit_tiny_3d": (192, 12, 3),
    "vit_small_3d": (384, 12, 6),
    "vit_base_3d": (768, 12, 12),
    "vit_large_3d": (1024, 24, 16),
    "vit_giant2_3d": (1536, 40, 24),
}
ARCH_NAMES = tuple(ARCH_SHAPES)
NUM_GLOBAL_CROPS = 2  # of a volume, as in DINOv2: each is what the other one is predicted from
DTYPE_NAMES = ("fp16", "bf16", "fp32", "fp64")
ONLINE_KINDS = ("knn", "linear", "readout", "retrieval")


def key(default: Any, meaning: str, is_path: bool = False, is_decisive: bool = True) -> Any:
    """A configuration key.

    Args:
        default: Its default.
        meaning: One line, which the generated YAML repeats as a comment.
        is_path: A text that `None` is no value of; `~` is expanded, and weights do not carry it (nor a list that holds paths).
        is_decisive: False for a key of a recipe that changes no result, only whether there is one.
    """
    metadata = {"meaning": meaning, "is_path": is_path}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata, repr=is_decisive)
    return field(default=default, metadata=metadata, repr=is_decisive)


def section(cls: type, meaning: str = "", **values: Any) -> Any:
    """A nested group of keys; `values` are the defaults that differ from the group's own."""
    return field(default_factory=lambda: cls(**values), metadata={"meaning": meaning})


def require(condition: bool, problem: str) -> None:
    """Raise `ConfigError(problem)` unless the condition holds."""
    if not condition:
        raise ConfigError(problem)


def require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:  # asked first: looking for the nearest word takes longer than all else that is checked
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}{nearest(str(value), allowed)}")


def require_range(name: str, value: list[float], low: float, high: float, low_included: bool = False) -> None:
    ok = len(value) == 2 and (low < value[0] or (low_included and low == value[0])) and value[0] <= value[1] <= high
    sign = "<=" if low_included else "<"
    require(ok, f"{name}={list(value)} must be [low, high] with {low:g} {sign} low <= high <= {high:g}")


def memory_budget(mode: str) -> float | None:
    """The share of `train.activation_checkpointing=budget:SHARE`; None for none and full.

    Raises:
        ConfigError: It is neither of the three.
    """
    name = f"train.activation_checkpointing={mode}"
    require(mode != "selective", f"{name} is gone (slow, and saved little): use budget:0.8 (with train.compile), or full")
    if mode in ("none", "full"):
        return None
    share = re.fullmatch(r"budget:(0?\.\d+|[01](\.0*)?)", mode)
    if share is None:
        raise ConfigError(f"{name} is not one of none, full, budget:SHARE with a share from 0 to 1, such as budget:0.8")
    return float(share[1])


def notify_words(command: Any) -> list[str]:
    """The words of `train.notify`: a list of them, or a text that is split as a shell would; no shell reads them.

    Raises:
        ConfigError: It is neither, or its quotes are not closed.
    """
    if isinstance(command, str):
        try:
            return shlex.split(command)
        except ValueError as err:
            raise ConfigError(f"train.notify={command!r}: {err}: close it, or give a list of words") from err
    is_list = not isinstance(command, (bool, int, float, dict)) and all(isinstance(word, str) for word in command)
    require(is_list, f"train.notify={command!r} is neither a command nor a list of its words")
    return list(command)


@dataclass
class ModelConfig:
    WEIGHTS: str = key(
        "", "path of weights to start the student's backbone from; the same as student.pretrained_weights", is_path=True
    )


@dataclass
class MixedPrecisionConfig:
    param_dtype: str = key("fp16", "dtype of the matrix products: fp16, bf16, fp32 or fp64; fp16 on a CPU becomes fp32")
    reduce_dtype: str = key("fp16", "dtype in which gradients are summed across ranks (fsdp only)")
    buffer_dtype: str = key("fp32", "dtype of buffers (fsdp only)")

    def __post_init__(self) -> None:
        for name in ("param_dtype", "reduce_dtype", "buffer_dtype"):
            require_choice(f"compute_precision.*.mixed_precision.{name}", getattr(self, name), DTYPE_NAMES)


def _head_precision() -> Any:
    return section(MixedPrecisionConfig, reduce_dtype="fp32")


@dataclass
class ModulePrecisionConfig:
    sharding_strategy: str = key("SHARD_GRAD_OP", "FULL_SHARD, SHARD_GRAD_OP or NO_SHARD (fsdp only)")
    mixed_precision: MixedPrecisionConfig = section(MixedPrecisionConfig)

    def __post_init__(self) -> None:
        allowed = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
        require_choice("compute_precision.*.sharding_strategy", self.sharding_strategy, allowed)


@dataclass
class StudentHeadPrecisionConfig(ModulePrecisionConfig):
    mixed_precision: MixedPrecisionConfig = _head_precision()


@dataclass
class TeacherPrecisionConfig:
    backbone: ModulePrecisionConfig = section(ModulePrecisionConfig)
    dino_head: ModulePrecisionConfig = section(ModulePrecisionConfig)
    ibot_head: ModulePrecisionConfig = section(ModulePrecisionConfig)


@dataclass
class StudentPrecisionConfig:
    backbone: ModulePrecisionConfig = section(ModulePrecisionConfig)
    dino_head: StudentHeadPrecisionConfig = section(StudentHeadPrecisionConfig)
    ibot_head: StudentHeadPrecisionConfig = section(StudentHeadPrecisionConfig)


@dataclass
class ComputePrecisionConfig:
    grad_scaler: bool = key(True, "scale the loss against fp16 underflow (CUDA with fp16 only)")
    teacher: TeacherPrecisionConfig = section(TeacherPrecisionConfig)
    student: StudentPrecisionConfig = section(StudentPrecisionConfig)


@dataclass
class HeadConfig:
    loss_weight: float = key(1.0, "weight of this objective in the total loss")
    head_n_prototypes: int = key(65536, "prototypes K: outputs of the head")
    head_bottleneck_dim: int = key(256, "width in front of the prototypes")
    head_nlayers: int = key(3, "linear layers of the head's MLP")
    head_hidden_dim: int = key(2048, "width of the head's MLP")

    def __post_init__(self) -> None:
        for name in ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim"):
            require(getattr(self, name) >= 1, f"dino|ibot.{name}={getattr(self, name)} must be at least 1")
        require(self.loss_weight >= 0, f"dino|ibot.loss_weight={self.loss_weight} must not be negative")


@dataclass
class DinoConfig(HeadConfig):
    koleo_loss_weight: float = key(0.1, "weight of the KoLeo regulariser (spread of class tokens); 0 leaves it out")
    koleo_distributed: bool = key(False, "KoLeo neighbours among all ranks' volumes; false: among a rank's own, as the paper")


@dataclass
class IbotConfig(HeadConfig):
    mask_sample_probability: float = key(0.5, "share of the global crops that are masked")
    mask_ratio_min_max: list[float] = key([0.2, 0.75], "range of the masked share of a masked crop's patches")
    separate_head: bool = key(True, "a head of its own for patches; false shares the DINO head")

    def __post_init__(self) -> None:
        super().__post_init__()
        p = self.mask_sample_probability
        require(0 <= p <= 1, f"ibot.mask_sample_probability={p} must lie in [0, 1]")
        require_range("ibot.mask_ratio_min_max", self.mask_ratio_min_max, 0, 1, low_included=True)


@dataclass
class SwinConfig:
    rotation_loss_weight: float = key(1.0, "weight of telling a view's rotation")
    contrastive_loss_weight: float = key(1.0, "weight of telling which views are of one cube")
    reconstruction_loss_weight: float = key(1.0, "weight of filling in what a view lost")
    contrastive_dim: int = key(512, "features of a view that are contrasted")
    contrastive_temperature: float = key(0.5, "temperature of their cosines")
    max_corrupted: float = key(0.3, "largest share of a view filled with noise, and with another volume")

    def __post_init__(self) -> None:
        weights = [getattr(self, f"{name}_loss_weight") for name in ("rotation", "contrastive", "reconstruction")]
        require(min(weights) >= 0 < max(weights), f"swin.*_loss_weight={weights} must not be negative, nor all 0")
        require(self.contrastive_dim >= 1, f"swin.contrastive_dim={self.contrastive_dim} must be at least 1")
        for name, high in (("contrastive_temperature", math.inf), ("max_corrupted", 1)):
            require(0 < getattr(self, name) <= high, f"swin.{name}={getattr(self, name)} must lie in (0, {high:g}]")


@dataclass
class TrainConfig:
    objective: str = key("3dino", "what is learned: 3dino, or swin (the tasks of Swin UNETR's pretraining, section swin)")
    orientation: str = key(
        "", "where the axes of volumes are turned to point, such as RAS; empty: as stored, the slice axis last"
    )
    batch_size_per_gpu: int = key(128, "volumes per rank and forward pass")
    accumulation_steps: int = key(1, "passes per update; the effective batch is batch_size_per_gpu x ranks x this")
    data_min_axis_size: int = key(24, "keep only volumes whose smallest axis is greater than this (voxels)")
    dataset_path: str = key("", "datalist (JSON) of the volumes to train on", is_path=True)
    output_dir: str = key("./output_test", "folder for checkpoints, metrics and logs; --output-dir overrides it", is_path=True)
    saveckp_freq: int = key(20, "accepted for old files, no effect: use train.checkpoint_period")
    checkpoint_period: int = key(3750, "iterations between two training checkpoints")
    checkpoint_keep: int = key(3, "training checkpoints kept; those at evaluation periods are kept besides")
    log_period: int = key(10, "iterations between two lines of training_metrics.json and of the log")
    seed: int = key(0, "seed of initialisation, order, crops and masks")
    num_workers: int = key(32, "loader processes; any number gives the same batches; -1: as many as cores are left")
    num_threads: int | None = key(
        None, "CPU threads of the training process; null: torch's choice; 1 beside loaders on few cores"
    )
    OFFICIAL_EPOCH_LENGTH: int = key(1250, "iterations that the schedules count as one epoch")
    cache_dataset: bool = key(True, "accepted for old files, no effect: see train.cache_dir and train.memory_store_mb")
    cache_dir: str = key(
        "", "folder of preprocessed volumes on disk, filled as they are used; empty: none; --cache-dir", is_path=True
    )
    cache_max_gb: float | None = key(None, "the cache folder stops growing at about this size (GiB); null: no limit")
    memory_store_mb: int = key(
        1024, "preprocessed volumes kept in memory, MiB of a rank, shared by its loader processes; 0 keeps none"
    )
    augmentation: str = key("auto", "monai (the reference), fast (the same crops sooner), auto: fast")
    compile: Any = key(
        "auto", "torch.compile for each block (a minute of compiling): true, false, or auto: on GPUs with Triton"
    )
    activation_checkpointing: str = key(
        "none",
        "what blocks compute again in the backward pass: none, budget:SHARE (of what compiled blocks keep, e.g. 0.8), full",
    )
    strategy: str = key("auto", "single, ddp, fsdp, or auto: single in one process, else fsdp on GPUs and ddp on CPUs")
    backend: str = key("auto", "between ranks: nccl, gloo, or auto: nccl where every rank has a GPU, else gloo")
    timeout_s: float = key(600.0, "seconds that a rank waits for the others before it gives up")
    centering: str = key("sinkhorn_knopp", "teacher targets: sinkhorn_knopp or centering")
    keep_best: str = key("", "TASK/METRIC of evaluation.tasks whose best teacher is kept in eval/best; empty: none is")
    stop_on_collapse: bool = key(False, "end the run, saved, with exit code 3 when its metrics are those of a collapse")
    notify: Any = key(
        "", "command run when the run ends, stops, fails or warns: a text, or a list of words (docs/watching.md)", is_path=True
    )

    def __post_init__(self) -> None:
        require_choice("train.objective", self.objective, ("3dino", "swin"))
        axes = sorted(next((pair for pair in ("LR", "PA", "IS") if c in pair), c) for c in self.orientation)
        problem = f"train.orientation={self.orientation!r} is not three of L or R, P or A, I or S in any order, such as RAS"
        require(axes in ([], ["IS", "LR", "PA"]), problem)
        require_choice("train.centering", self.centering, ("sinkhorn_knopp", "centering"))
        require_choice("train.strategy", self.strategy, ("auto", "single", "ddp", "fsdp"))
        memory_budget(self.activation_checkpointing)
        notify_words(self.notify)
        require(self.compile in (True, False, "auto"), f"train.compile={self.compile!r} is not one of true, false, auto")
        require_choice("train.backend", self.backend, ("auto", "nccl", "gloo"))
        require(self.timeout_s > 0, f"train.timeout_s={self.timeout_s} must be positive")
        require_choice("train.augmentation", self.augmentation, ("auto", "monai", "fast"))
        cap = self.cache_max_gb
        require(cap is None or cap > 0, f"train.cache_max_gb={cap} must be positive, or null for no limit")
        at_least_one = ("batch_size_per_gpu", "accumulation_steps", "checkpoint_period", "checkpoint_keep")
        for name in (*at_least_one, "log_period", "OFFICIAL_EPOCH_LENGTH"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1")
        require(self.num_threads is None or self.num_threads >= 1, f"train.num_threads={self.num_threads} must be at least 1")
        require(
            self.num_workers >= -1,
            f"train.num_workers={self.num_workers} must be at least 0, or -1 for as many as cores are left",
        )
        for name in ("memory_store_mb", "data_min_axis_size", "seed"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must not be negative")


@dataclass
class StudentConfig:
    arch: str = key("vit_large_3d", "vit_tiny_3d, vit_small_3d, vit_base_3d, vit_large_3d or vit_giant2_3d")
    embed_dim: int | None = key(None, "token width, instead of the arch's")
    depth: int | None = key(None, "number of blocks, instead of the arch's")
    num_heads: int | None = key(None, "attention heads, instead of the arch's")
    patch_size: int = key(16, "edge of a cubic patch (voxels)")
    num_register_tokens: int = key(0, "register tokens beside the class token")
    pos_encoding: str = key("learned", "learned (interpolated to the grid) or rope (3D rotary, on queries and keys)")
    interpolate_offset: float = key(0.1, "added to the grid size when learned positions are interpolated; 0 is exact")
    init: str = key("trunc_normal", "linear layers: trunc_normal (std 0.02, as DINOv2) or xavier (uniform)")
    attention: str = key("auto", "sdpa, xformers (CUDA, installed), or auto: xformers where it can run, else sdpa")
    drop_path_rate: float = key(0.3, "stochastic depth: share of samples that skip a residual branch")
    layerscale: float | None = key(1e-05, "initial value of LayerScale; null leaves LayerScale out")
    drop_path_uniform: bool = key(True, "the same rate in every block; false rises linearly from 0")
    pretrained_weights: str = key("", "teacher checkpoint to start the backbone from", is_path=True)
    pretrained_weights_inflation: str | None = key(
        None, "the start weights are a 2D ViT's (DINOv2), inflated along slices: central or mean; null: they are 3D"
    )
    full_pretrained_weights: str = key(
        "", "teacher checkpoint to start backbone and heads from, student and teacher", is_path=True
    )
    ffn_layer: str = key("mlp", "mlp, swiglu or swiglufused")
    block_chunks: int = key(4, "groups of blocks in the state dict's names; 0 is flat; weights of either form load")
    qkv_bias: bool = key(True, "bias of the query/key/value projection")
    proj_bias: bool = key(True, "bias of the attention's output projection")
    ffn_bias: bool = key(True, "bias of the MLP's layers")

    def __post_init__(self) -> None:
        require_choice("student.arch", self.arch, ARCH_NAMES)
        require_choice("student.ffn_layer", self.ffn_layer, ("mlp", "swiglu", "swiglufused"))
        require_choice("student.pos_encoding", self.pos_encoding, ("learned", "rope"))
        require_choice("student.init", self.init, ("trunc_normal", "xavier"))
        require_choice("student.attention", self.attention, ("auto", "sdpa", "xformers"))
        embed_dim, depth, num_heads = self.shape()
        require(min(embed_dim, depth, num_heads) >= 1, "student.embed_dim, depth and num_heads must be at least 1")
        heads_fit = embed_dim % num_heads == 0
        require(heads_fit, f"student.embed_dim={embed_dim} is not a multiple of student.num_heads={num_heads}")
        rope_fits = self.pos_encoding != "rope" or embed_dim // num_heads >= 6
        require(rope_fits, f"student.pos_encoding=rope needs 6 channels a head, got {embed_dim // num_heads}")
        chunks_fit = self.block_chunks >= 0 and (self.block_chunks == 0 or depth % self.block_chunks == 0)
        require(chunks_fit, f"student.block_chunks={self.block_chunks} does not divide the depth {depth}: use 0")
        require(0 <= self.drop_path_rate < 1, f"student.drop_path_rate={self.drop_path_rate} must lie in [0, 1)")
        require(self.patch_size >= 1, f"student.patch_size={self.patch_size} must be at least 1")
        require(self.num_register_tokens >= 0, "student.num_register_tokens must not be negative")
        how, ways = self.pretrained_weights_inflation, " is not central, mean or null"
        require(how in (None, "central", "mean"), f"student.pretrained_weights_inflation={how!r}{ways}")
        one_start = not (self.pretrained_weights and self.full_pretrained_weights)
        require(one_start, "student.pretrained_weights and student.full_pretrained_weights are both set: keep one")

    def shape(self) -> tuple[int, int, int]:
        """(embed_dim, depth, num_heads): the arch's, where a key of its own does not replace it."""
        own = (self.embed_dim, self.depth, self.num_heads)
        return triple(a if o is None else o for a, o in zip(ARCH_SHAPES[self.arch], own, strict=True))


@dataclass
class TeacherConfig:
    momentum_teacher: float = key(0.992, "EMA momentum at the start, rising by a cosine to the final one")
    final_momentum_teacher: float = key(1.0, "EMA momentum at the end")
    warmup_teacher_temp: float = key(0.04, "teacher temperature at the start")
    teacher_temp: float = key(0.07, "teacher temperature after its warm-up")
    warmup_teacher_temp_epochs: int = key(30, "epochs of the linear temperature warm-up")

    def __post_init__(self) -> None:
        for name in ("momentum_teacher", "final_momentum_teacher"):
            require(0 <= getattr(self, name) <= 1, f"teacher.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("warmup_teacher_temp", "teacher_temp"):
            require(getattr(self, name) > 0, f"teacher.{name}={getattr(self, name)} must be positive")
        require(self.warmup_teacher_temp_epochs >= 0, "teacher.warmup_teacher_temp_epochs must not be negative")


@dataclass
class OptimConfig:
    epochs: int = key(100, "length of the run in epochs of train.OFFICIAL_EPOCH_LENGTH iterations")
    weight_decay: float = key(0.04, "AdamW weight decay at the start")
    weight_decay_end: float = key(0.4, "AdamW weight decay at the end (cosine)")
    base_lr: float = key(0.002, "learning rate at the reference batch of 1024, scaled by optim.scaling_rule")
    lr: float = key(0.0, "computed from optim.base_lr by optim.scaling_rule and written here; what a file says has no effect")
    warmup_epochs: int = key(10, "epochs of the linear learning-rate warm-up")
    min_lr: float = key(1e-06, "learning rate at the end of the cosine")
    clip_grad: float = key(3.0, "largest gradient norm of backbone and of each head; 0 does not clip")
    freeze_last_layer_epochs: int = key(1, "epochs during which the prototypes do not move")
    scaling_rule: str = key("sqrt_wrt_1024", "base_lr against batch: sqrt_wrt_1024, linear_wrt_256, or none: as it is")
    patch_embed_lr_mult: float = key(0.2, "learning-rate factor of the patch embedding")
    layerwise_decay: float = key(0.9, "learning-rate factor per block, from the last to the first")
    adamw_beta1: float = key(0.9, "AdamW's first moment decay")
    adamw_beta2: float = key(0.999, "AdamW's second moment decay")

    def __post_init__(self) -> None:
        require_choice("optim.scaling_rule", self.scaling_rule, ("sqrt_wrt_1024", "linear_wrt_256", "none"))
        require(self.epochs >= 1, f"optim.epochs={self.epochs} must be at least 1")
        for name in ("weight_decay", "weight_decay_end", "base_lr", "lr", "min_lr", "clip_grad", "warmup_epochs"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)} must not be negative")
        for name in ("adamw_beta1", "adamw_beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}={getattr(self, name)} must lie in [0, 1)")
        require(0 < self.layerwise_decay <= 1, f"optim.layerwise_decay={self.layerwise_decay} must lie in (0, 1]")


@dataclass
class CropsConfig:
    global_crops_in_slice_scale: list[float] = key([0.48, 1.0], "range of the in-plane area share of a global crop")
    global_crops_cross_slice_scale: list[float] = key([0.5, 1.0], "range of the share of slices of a global crop")
    local_crops_number: int = key(8, "local crops per volume; 0 trains on global crops alone")
    local_crops_in_slice_scale: list[float] = key([0.16, 0.48], "range of the in-plane area share of a local crop")
    local_crops_cross_slice_scale: list[float] = key([0.2, 0.5], "range of the share of slices of a local crop")
    global_crops_size: int = key(96, "edge of a global crop after resizing (voxels)")
    local_crops_size: int = key(48, "edge of a local crop after resizing (voxels)")
    region_mm: float | None = key(None, "edge (mm) of the cube all crops of a draw come from; null: the whole volume")
    region_vox: float | None = key(None, "the same in voxels of each volume, instead of crops.region_mm")
    turn_p: float = key(0.3, "probability of each of the three flips, and of quarter turns in each of the three planes")
    rotate_range: float = key(0.0, "largest angle (radians) by which each crop is turned about each axis on its own")
    sharpen_alpha: list[float] = key([10.0, 30.0], "range of the strength of sharpening")

    def __post_init__(self) -> None:
        for name in ("global_crops_in_slice", "global_crops_cross_slice", "local_crops_in_slice", "local_crops_cross_slice"):
            require_range(f"crops.{name}_scale", getattr(self, f"{name}_scale"), 0, 1)
        require(self.local_crops_number >= 0, "crops.local_crops_number must not be negative")
        for name in ("region_mm", "region_vox"):
            edge = getattr(self, name)
            require(edge is None or edge > 0, f"crops.{name}={edge} must be positive")
        one_region = self.region_mm is None or self.region_vox is None
        require(one_region, "crops.region_mm and crops.region_vox are both set: make one of them null")
        require(0 <= self.turn_p <= 1, f"crops.turn_p={self.turn_p} must lie in [0, 1]")
        right_angle = math.pi / 2
        require(0 <= self.rotate_range <= right_angle, f"crops.rotate_range={self.rotate_range} must lie in [0, pi / 2]")
        require_range("crops.sharpen_alpha", self.sharpen_alpha, 0, math.inf, low_included=True)


@dataclass
class OnlineTaskConfig:
    """An entry of `evaluation.tasks`."""

    kind: str = key("", "knn, linear (classes of scans), readout (labels of patches), or retrieval (the same place elsewhere)")
    dataset: str = key("", "recipe of the labelled list: a name of configs/eval/datasets, or a YAML file")
    base_data_dir: str = key("", "folder of the list")
    name: str = key("", "of the task in metrics; default: KIND-DATASET")
    size: int | None = key(None, "edge of what the network is shown (voxels); null: crops.global_crops_size")

    def __post_init__(self) -> None:
        require_choice("evaluation.tasks: kind", self.kind, ONLINE_KINDS)
        for name in ("dataset", "base_data_dir"):
            require(bool(getattr(self, name)), f"evaluation.tasks: a task of kind {self.kind} has no {name}: add it")
        require("/" not in self.name, f"evaluation.tasks: name={self.name!r} has a slash, which is between task and metric")
        require(self.size is None or self.size >= 1, f"evaluation.tasks: size={self.size} must be at least 1")


@dataclass
class EvaluationConfig:
    eval_period_iterations: int = key(12500, "iterations between two teacher checkpoints for evaluation; 0: the last only")
    tasks: list[OnlineTaskConfig] = key(
        [],
        "what the teacher is measured by as it learns: list of {kind, dataset, base_data_dir, name, size} (docs/online.md)",
        is_path=True,
    )
    tasks_period_iterations: int | None = key(
        None, "iterations between two measurements by evaluation.tasks; null: eval_period_iterations"
    )

    def __post_init__(self) -> None:
        require(self.eval_period_iterations >= 0, "evaluation.eval_period_iterations must not be negative")
        period = self.tasks_period_iterations
        require(period is None or period >= 0, f"evaluation.tasks_period_iterations={period} must not be negative")


@dataclass
class SegmentationConfig:
    decoder_channels: list[int] = key([256, 128, 64, 32], "decoder widths at 1/8, 1/4, 1/2 and 1 of the size")
    inplanes: int = key(64, "channels of the adapter's convolutions at 1/2; up to four times as many at 1/16")
    feature_ratio: float = key(0.25, "width of the deformable attention's values over the backbone's")
    num_points: int = key(4, "points that a query reads, per head and level")
    ffn_ratio: float = key(0.25, "hidden width of the extractors' feed-forward over the backbone's")
    drop_path_rate: float = key(0.2, "stochastic depth of the extractors' feed-forward")
    checkpointing: bool = key(False, "compute the adapter's stages, or SwinUNETR's blocks, again in the backward pass")
    linear_batch_norm: bool = key(False, "a BatchNorm between the two layers of the Linear head")
    layerwise_decay: float = key(1.0, "learning rate of a block over the one above (--train-feature-model); 1: one for all")
    window_batch: int = key(4, "windows a pass of the sliding window")
    swin_width: int = key(48, "features of SwinUNETR at half of the size; twice as many at each halving")
    swin_window: int = key(7, "cells along an edge of SwinUNETR's attention windows (2 to 8)")
    unet_width: int = key(32, "features of UNet at the full size; twice as many at each halving, up to ten times")

    def __post_init__(self) -> None:
        widths = self.decoder_channels
        require(len(widths) == 4 and min(widths) > 0, f"segmentation.decoder_channels={widths} must be four positive widths")
        require(
            self.swin_width > 0 and self.swin_width % 12 == 0,
            f"segmentation.swin_width={self.swin_width} must be a multiple of 12 (the network's heads)",
        )
        require(2 <= self.swin_window <= 8, f"segmentation.swin_window={self.swin_window} must be 2 to 8")
        for name in ("inplanes", "num_points", "window_batch", "unet_width"):
            require(getattr(self, name) > 0, f"segmentation.{name}={getattr(self, name)} must be at least 1")
        require(0 < self.feature_ratio <= 1, f"segmentation.feature_ratio={self.feature_ratio} must lie in (0, 1]")
        require(0 <= self.drop_path_rate < 1, f"segmentation.drop_path_rate={self.drop_path_rate} must lie in [0, 1)")
        require(0 < self.layerwise_decay <= 1, f"segmentation.layerwise_decay={self.layerwise_decay} must lie in (0, 1]")


@dataclass
class Config:
    MODEL: ModelConfig = section(ModelConfig, "start weights, DINOv2's spelling")
    compute_precision: ComputePrecisionConfig = section(ComputePrecisionConfig, "dtypes and sharding, per module")
    dino: DinoConfig = section(DinoConfig, "image-level objective: class tokens of all crops")
    ibot: IbotConfig = section(IbotConfig, "patch-level objective: masked patches of the global crops")
    swin: SwinConfig = section(SwinConfig, "the tasks of train.objective=swin, the baseline MONAI-ViT")
    train: TrainConfig = section(TrainConfig, "data, batch, output")
    student: StudentConfig = section(StudentConfig, "the network")
    teacher: TeacherConfig = section(TeacherConfig, "the exponential moving average of the student")
    optim: OptimConfig = section(OptimConfig, "optimiser and schedules")
    crops: CropsConfig = section(CropsConfig, "multi-crop geometry")
    evaluation: EvaluationConfig = section(EvaluationConfig, "teacher checkpoints, and what the teacher is measured by")
    segmentation: SegmentationConfig = section(SegmentationConfig, "adapter and decoders of segmentation3d.py")

    def __post_init__(self) -> None:
        """Rules between sections."""
        p = self.student.patch_size
        for name in ("global_crops_size", "local_crops_size"):
            size = getattr(self.crops, name)
            nearest_valid = sorted({max(p, size // p * p), max(1, math.ceil(size / p)) * p})
            use = " or ".join(map(str, nearest_valid))
            require(size >= 1 and size % p == 0, f"crops.{name}={size} is not a multiple of student.patch_size={p}: use {use}")
        is_power = self.train.objective != "swin" or p & (p - 1) == 0 < p - 1
        require(is_power, f"student.patch_size={p} is no power of 2, which train.objective=swin needs to fill views in again")
        starts = [self.MODEL.WEIGHTS, self.student.pretrained_weights or self.student.full_pretrained_weights]
        require(not all(starts), "MODEL.WEIGHTS and student.[full_]pretrained_weights are both set: keep one")
        is_backbone = bool(self.MODEL.WEIGHTS or self.student.pretrained_weights)
        require(
            is_backbone or self.student.pretrained_weights_inflation is None,
            "student.pretrained_weights_inflation needs student.pretrained_weights, the 2D network's file (it has no heads for "
            "full_pretrained_weights)",
        )
        dtypes = {m.mixed_precision.param_dtype for m in self.precision_modules()}
        require("fp64" not in dtypes or dtypes == {"fp64"}, "param_dtype fp64 must be set for all six modules or for none")

    def precision_modules(self) -> list[ModulePrecisionConfig]:
        """Precision settings of backbone, dino_head and ibot_head of student and teacher."""
        sides = (self.compute_precision.student, self.compute_precision.teacher)
        return [m for side in sides for m in (side.backbone, side.dino_head, side.ibot_head)]
