"""Functions of one tensor that no diffusers network need be made of, but that a linearization meets.

`EXACT` entries are operations that networks, hooks and LoRA variants use; the others may instead be refused
with an UnsupportedOperation that names the operation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from networks import EXACT, EXACT_OR_UNSUPPORTED, Case
from torch import Tensor, nn

SHAPE = (2, 4, 3, 5)


def constant(x: Tensor, *shape: int, seed: int = 0) -> Tensor:
    """Fixed normal numbers in the dtype of x."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


@dataclass(frozen=True)
class Function:
    """A function, the shape of its argument and what is expected of its linearization."""

    name: str
    f: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = SHAPE
    # The words of which one must stand in the message of a refusal; none: a refusal is a failure.
    refusal: str = ""
    tolerance: float = 1e-10

    @property
    def expectation(self) -> str:
        return EXACT_OR_UNSUPPORTED if self.refusal else EXACT

    def build(self, dtype: torch.dtype = torch.float64) -> Case:
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        x, x2 = (torch.randn(self.shape, generator=generator).to(dtype) for _ in range(2))
        return Case(self.f, x, x2)


def _in_place_chain(x: Tensor) -> Tensor:
    y = x.clone().mul_(1.5).add_(0.2)
    F.relu(y, inplace=True)
    F.silu(y, inplace=True)
    y.div_(1 + x.square()).sub_(x, alpha=0.3)
    return y


def _slice_assignment(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :2] = x[:, 1:3] * 2
    y[:, 2:, 1] = x[:, :2, 0].sin()
    y[0, 3] += x[1, 3]
    return y * x


def _write_through_view(x: Tensor) -> Tensor:
    y = x.clone()
    y.view(2, 4, 15)[:, 1].add_(x.flatten(2)[:, 2].exp())
    y.transpose(2, 3)[..., 0].mul_(3)
    return y.square()


def _view_sees_later_write(x: Tensor) -> Tensor:
    y = x.sin()
    view = y.flatten(1)
    y.mul_(x)
    return view * view


def _factor_overwritten_after_use(x: Tensor) -> Tensor:
    y = x.sin()
    product = y * x.cos()
    y.add_(1).mul_(x)
    return product + y.exp()


def _constant_overwritten_after_use(x: Tensor) -> Tensor:
    weight = constant(x, 5)
    product = x * weight
    weight.mul_(-3)
    return product + (x * weight).sin()


def _chained_overwrite(x: Tensor) -> Tensor:
    buffer = torch.empty_like(x)
    buffer.copy_(x)
    buffer[:] = buffer.tanh()
    buffer.fill_diagonal_(0.5) if buffer.ndim == 2 else buffer[..., 0].fill_(0.5)
    buffer.masked_fill_(constant(x, 5) > 0.5, 2.0)
    return buffer * x


def _index_put(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, torch.tensor([2, 0])] = x[:, torch.tensor([1, 3])].square()
    y.index_add_(3, torch.tensor([1, 1]), x[..., :2])
    return y


def _write_through_chunk(x: Tensor) -> Tensor:
    y = x.sin()
    first, second = y.chunk(2, dim=1)
    first.mul_(second)
    y.unbind(3)[2].sub_(first.sum())
    return y


def _overwritten_with_constants(x: Tensor) -> Tensor:
    y = x.sin()
    y[:, 0] = 3.0
    y[:, 1:3].zero_()
    y[:, 1] += 1
    y[0, 3].fill_(x.mean())
    return y * x


def _view_made_before_the_writes(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    beside, below = y[:, 3], y[:, 0]
    y[:, :2] = x[:, :2]
    total = (y * y).sum()
    beside.fill_(7.0)
    below.add_(1)
    return y * y * total + (y[:, 3] * x[:, 3]).sum()


def _copy_across_dtypes(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.float32)
    y.copy_(x)
    y[:] = y[:1] * 2
    return y.to(x.dtype) * x


def _scatter(x: Tensor) -> Tensor:
    index = torch.tensor([[0, 2, 2, 1, 0]]).expand(2, 4, 1, 5)
    y = x.clone().scatter_add_(2, index, x[:, :, :1].sin())
    return torch.scatter(y, 2, index[..., :1], x[..., 1:2, 2:3]) * y


def _vmap_inside(x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: row.sin() @ row.transpose(-1, -2))(x)


def _energy_gradient(x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: (x.sin() * x.square()).sum() + x.mean().exp())(x)


def _read_only_parts(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1].sin(), torch.ones_like(x[:, :2]), (x[:, 2:] > 0).to(x.dtype)], dim=1)


def _attention(
    x: Tensor, lengths: tuple[int, int] = (6, 6), heads: tuple[int, int] = (2, 2), **options: object
) -> Tensor:
    """x [1, 2, 6, 4] attends to a smooth function of itself."""
    q = (x @ constant(x, 4, 4, seed=1))[:, :, : lengths[0]].repeat(1, heads[0] // 2, 1, 1)
    k = (x.sin() @ constant(x, 4, 4, seed=2))[:, : heads[1], : lengths[1]]
    v = (x.cos() @ constant(x, 4, 7, seed=3))[:, : heads[1], : lengths[1]]
    return F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]


def _boolean_mask(x: Tensor) -> Tensor:
    return constant(x, 6, 6, seed=4) > -0.5


def _infinite_bias(x: Tensor) -> Tensor:
    return _attention(x, attn_mask=x.new_zeros(6, 6).masked_fill(_boolean_mask(x), float("-inf")))


def _masked_scores(x: Tensor) -> Tensor:
    return x.masked_fill(constant(x, 5) > 0.5, float("-inf")).softmax(-1) @ x.sin().transpose(-1, -2)


def _differentiable_bias(x: Tensor) -> Tensor:
    k = constant(x, 1, 2, 6, 4)
    return F.scaled_dot_product_attention(x, k, k, attn_mask=(x @ x.transpose(-1, -2)).sin())


def _constant_query(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(constant(x, 1, 2, 3, 4), x.sin(), x * x)


def _constant_keys(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, constant(x, 1, 2, 9, 4), constant(x, 1, 2, 9, 4, seed=5))


def _constant_scores(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(constant(x, 1, 2, 3, 4), constant(x, 1, 2, 6, 4, seed=6), x)


def _seeded(make: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    """The module, made with fixed weights, as a function; float32 and float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
    copies = {torch.float32: module, torch.float64: copy.deepcopy(module).double()}
    return lambda x: copies[x.dtype](x)


class _SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def _batch_norm(x: Tensor) -> Tensor:
    mean, variance = constant(x, 4), constant(x, 4, seed=1).square() + 0.1
    return F.batch_norm(x, mean, variance, constant(x, 4, seed=2), constant(x, 4, seed=3), training=False)


def _modulated_norm(x: Tensor) -> Tensor:
    shift = x.mean((2, 3), keepdim=True)
    return F.group_norm(x, 2, constant(x, 4), constant(x, 4, seed=1)) * (1 + shift.tanh()) + shift


def _weights_from_input(x: Tensor) -> Tensor:
    return F.conv2d(x, x[:, :, :2, :2].sin(), padding=1)


# Each with the word that a refusal must contain; an empty one where the operation must be supported.
ACTIVATIONS = dict.fromkeys(
    ("relu", "silu", "gelu", "mish", "elu", "leaky_relu", "softplus", "tanh", "sigmoid"), ""
)
ACTIVATIONS |= {"selu": "elu", "hardtanh": "hardtanh", "logsigmoid": "log_sigmoid", "hardswish": "hardswish"}
SMOOTH = dict.fromkeys(("sin", "cos", "exp", "square", "erf", "abs", "neg"), "")
SMOOTH |= {
    n: n for n in ("sinh", "cosh", "atan", "expm1", "exp2", "sign", "floor", "round", "frac", "asinh", "erfc")
}
SMOOTH |= {n: n for n in ("sinc", "i0", "digamma")}
POSITIVE = dict.fromkeys(("log", "sqrt", "rsqrt", "reciprocal"), "")
POSITIVE |= {name: name for name in ("log1p", "log2", "log10", "lgamma")}


def _positive(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(torch, name)(x.square() + 0.4)


_FUNCTIONS = [
    *(Function(name, getattr(F, name), refusal=word) for name, word in ACTIVATIONS.items()),
    *(
        Function(name, getattr(torch, name), refusal=word)
        for name, word in SMOOTH.items()
        if name not in ACTIVATIONS
    ),
    *(Function(name, _positive(name), refusal=word) for name, word in POSITIVE.items()),
    Function("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    Function("product", lambda x: x * x.roll(1, 0) * 2),
    Function("quotient", lambda x: x / (1.5 + x.roll(1, 1).square())),
    Function("scalar_by_tensor", lambda x: 2.0 / (x.square() + 1) - (1 - x)),
    Function("broadcast_product", lambda x: x[:, :1] * x + x.sum(0) * x.mean((2, 3), keepdim=True)),
    Function("power", lambda x: x**3 + (x.abs() + 0.1) ** 2.5 + x**2 + x**1),
    Function("power_tensor", lambda x: (x.square() + 0.5) ** constant(x, 5), refusal="pow"),
    Function("power_base", lambda x: 1.7**x + (x.square() + 0.5) ** x, refusal="pow"),
    Function("where", lambda x: torch.where(x > 0.1, x.sin(), x.square())),
    Function("clamp", lambda x: x.clamp(-0.5, 0.7) + x.clamp(min=0.1)),
    Function("max_min", lambda x: torch.maximum(x, x.roll(1, 0)) - torch.minimum(x, x.new_tensor(0.1))),
    Function("masked_fill", lambda x: x.masked_fill(x > 0.5, -3.0) * x),
    Function(
        "lerp", lambda x: torch.lerp(x, x.sin(), 0.3) + torch.lerp(x, x.cos(), x.sigmoid()), refusal="lerp"
    ),
    Function("addcmul", lambda x: torch.addcmul(x, x.sin(), x.cos(), value=0.7), refusal="addcmul"),
    Function("atan2", lambda x: torch.atan2(x, x.roll(1, 0)), refusal="atan2"),
    Function("remainder", lambda x: torch.remainder(x, 0.7), refusal="remainder"),
    Function("add_alpha", lambda x: torch.add(x, x.sin(), alpha=0.4) - torch.sub(3.0 * x, x, alpha=2)),
    Function("in_place_chain", _in_place_chain),
    Function("slice_assignment", _slice_assignment),
    Function("write_through_view", _write_through_view),
    Function("view_sees_later_write", _view_sees_later_write),
    Function("factor_overwritten_after_use", _factor_overwritten_after_use),
    Function("constant_overwritten_after_use", _constant_overwritten_after_use),
    Function("chained_overwrite", _chained_overwrite),
    Function("index_put", _index_put, refusal="index_put|index_add"),
    Function("write_through_chunk", _write_through_chunk),
    Function("overwritten_with_constants", _overwritten_with_constants),
    Function("view_made_before_the_writes", _view_made_before_the_writes),
    Function("copy_across_dtypes", _copy_across_dtypes, tolerance=1e-6),
    Function("scatter", _scatter, refusal="scatter"),
    Function("foreach", lambda x: torch.stack(torch._foreach_mul([x, x.sin()], 2.0)), refusal="foreach"),
    Function("vmap_inside", _vmap_inside, refusal="."),
    Function("energy_gradient", _energy_gradient, refusal="."),
    Function("einsum", lambda x: torch.einsum("bchw,dc,bchv->bdwv", x, constant(x, 6, 4), x.sin())),
    Function("matmul", lambda x: (x @ x.transpose(-1, -2)) @ x + x @ constant(x, 5, 5)),
    Function(
        "matrix_vector",
        lambda x: (x[0, 0] @ constant(x, 5)) * x[0, 0, :, 0].dot(constant(x, 3)),
        refusal="mv|dot",
    ),
    Function(
        "baddbmm", lambda x: torch.baddbmm(x[0], x[1] @ constant(x, 5, 3), x[0].sin(), beta=0.5, alpha=2)
    ),
    Function("addmm", lambda x: torch.addmm(x[0, 0, 0], x[0, 1], constant(x, 5, 5))),
    Function(
        "linear_of_both", lambda x: F.linear(x[0], x[1, 0].sin(), constant(x, 3)), refusal="linear|mm|matmul"
    ),
    Function(
        "bilinear", lambda x: F.bilinear(x, x.sin(), constant(x, 2, 5, 5)), refusal="bilinear|trilinear"
    ),
    Function("cumsum", lambda x: x.cumsum(1) * x, refusal="cumsum"),
    Function("cumprod", lambda x: x.cumprod(1), refusal="cumprod"),
    Function("softmax", lambda x: x.softmax(-1) + (3 * x).softmax(1)),
    Function(
        "log_softmax",
        lambda x: x.log_softmax(-1) + x.logsumexp(2, keepdim=True),
        refusal="log_softmax|logsumexp",
    ),
    Function(
        "layer_norm_plain", lambda x: F.layer_norm(x, (5,)) + F.layer_norm(x, (3, 5), constant(x, 3, 5))
    ),
    Function("group_norm_plain", lambda x: F.group_norm(x, 2) + F.group_norm(x, 4, constant(x, 4))),
    Function("group_norm_sequence", lambda x: F.group_norm(x.flatten(2), 2).transpose(1, 2)),
    Function("modulated_norm", _modulated_norm),
    Function("batch_norm", _batch_norm, refusal="batch_norm"),
    Function("instance_norm", lambda x: F.instance_norm(x), refusal="batch_norm|instance_norm"),
    Function("rms_norm", lambda x: F.rms_norm(x, (5,), constant(x, 5)), refusal="rms_norm"),
    Function(
        "rms_norm_by_hand", lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * constant(x, 5)
    ),
    Function("normalize", lambda x: F.normalize(x, dim=1) + x.norm(), refusal="norm"),
    Function(
        "moments", lambda x: x.mean((1, 2)) + x.var((1, 2)) + x.std((1, 2), correction=0), refusal="var|std"
    ),
    Function("var_mean", lambda x: sum(torch.var_mean(x, (1, 2))), refusal="var|std"),  # type: ignore[arg-type]
    Function("prod", lambda x: x.prod(1) + x.sum(dtype=x.dtype), refusal="prod"),
    Function("amax", lambda x: x.amax((2, 3)) - x.amin(2).sum(-1), refusal="amax|amin"),
    Function("max_dim", lambda x: x.max(dim=1).values + x.min(dim=1)[0], refusal="max|min"),
    Function("sort", lambda x: x.sort(dim=1).values * x, refusal="sort"),
    Function("topk", lambda x: x.topk(2, dim=-1)[0], refusal="topk"),
    Function("gather", lambda x: x.gather(1, torch.zeros(2, 2, 3, 5, dtype=torch.long)), refusal="gather"),
    Function(
        "index",
        lambda x: x[:, torch.tensor([3, 0, 0])] + x.index_select(1, torch.tensor([1, 2, 3])),
        refusal="index",
    ),
    Function(
        "boolean_index",
        lambda x: x[:, torch.tensor([True, False, True, True])].sin(),
        refusal="index|nonzero",
    ),
    Function("take_along", lambda x: x.take_along_dim(x.argsort(-1), -1) * x, refusal="gather|sort|take"),
    Function(
        "embedding_of_input", lambda x: F.embedding(torch.tensor([1, 0, 1]), x[0, 0]), refusal="embedding"
    ),
    Function("pad_constant", lambda x: F.pad(x, (1, 2, 0, 1), value=0.7) + F.pad(x, (2, 1, 1, 0))),
    Function("pad_reflect", lambda x: F.pad(x, (2, 1, 1, 2), mode="reflect"), refusal="reflection_pad"),
    Function("pad_replicate", lambda x: F.pad(x, (2, 1, 1, 2), mode="replicate"), refusal="replication_pad"),
    Function("pad_circular", lambda x: F.pad(x, (2, 1, 1, 2), mode="circular"), refusal="pad|copy|slice"),
    Function("pixel_shuffle", lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2).sin()[..., :4, :8], 2)),
    Function("nearest", lambda x: F.interpolate(x, scale_factor=2.0) + F.interpolate(x, size=(6, 10))),
    Function("nearest_odd", lambda x: F.interpolate(x, size=(7, 8), mode="nearest")),
    Function(
        "nearest_exact", lambda x: F.interpolate(x, size=(7, 8), mode="nearest-exact"), refusal="nearest"
    ),
    Function("bilinear_resize", lambda x: F.interpolate(x, size=(7, 4), mode="bilinear"), refusal="bilinear"),
    Function(
        "bicubic_resize",
        lambda x: (
            F.interpolate(x, size=(7, 4), mode="bicubic", align_corners=True)
            + F.interpolate(x, size=(7, 4), mode="bilinear", antialias=True)
        ),
        refusal="bicubic|bilinear",
    ),
    Function("average_pool", lambda x: F.avg_pool2d(x, 2, stride=1) + F.adaptive_avg_pool2d(x, (2, 4))),
    Function("max_pool", lambda x: F.max_pool2d(x, 2, stride=1), refusal="max_pool"),
    Function(
        "conv1d", lambda x: F.conv1d(x.flatten(2), constant(x, 6, 4, 3), constant(x, 6), stride=2, padding=1)
    ),
    Function(
        "conv_grouped", lambda x: F.conv2d(x, constant(x, 6, 2, 3, 3), padding="same", dilation=2, groups=2)
    ),
    Function("conv_unbatched", lambda x: F.conv2d(x[0], constant(x, 6, 4, 2, 2), constant(x, 6))),
    Function(
        "conv_transpose",
        lambda x: F.conv_transpose2d(x, constant(x, 4, 3, 3, 3), stride=2, padding=1, output_padding=1),
    ),
    Function("conv3d", lambda x: F.conv3d(x[:, :, None], constant(x, 3, 4, 1, 3, 3)), refusal="conv"),
    Function("conv_of_both", _weights_from_input, refusal="conv"),
    Function("unfold", lambda x: F.unfold(x, 2).square(), refusal="im2col|unfold"),
    Function(
        "views",
        lambda x: x.permute(0, 2, 3, 1).reshape(2, 15, 4)[:, ::2].unsqueeze(1).squeeze(0).movedim(-1, 0),
    ),
    Function(
        "split_and_stack",
        lambda x: torch.stack([a * b for a, b in zip(*(t.split(1, 1) for t in x.chunk(2, 1)), strict=True)]),
    ),
    Function(
        "repeat",
        lambda x: x.repeat(1, 2, 1, 1).sin() + x.repeat_interleave(2, dim=1),
        refusal="repeat|index_select",
    ),
    Function("expand", lambda x: x[:, :1].expand(-1, 4, -1, -1) * x),
    Function("expanded_output", lambda x: x.mean().expand(3, 4)),
    Function("flip_roll", lambda x: x.flip(2) * x.roll((1, 2), (2, 3)), refusal="flip|roll"),
    Function(
        "triangle",
        lambda x: x.tril() + x.triu(1).sin() + x.diagonal(dim1=2, dim2=3).sum(),
        refusal="tril|triu|diagonal",
    ),
    Function("as_strided", lambda x: x.as_strided((2, 6, 5), (60, 5, 1)).sin(), refusal="as_strided"),
    Function(
        "fourier",
        lambda x: torch.fft.ifft2(torch.fft.fft2(x) * constant(x, 5).exp()).real,
        refusal="fft|complex",
    ),
    Function("attention", _attention, (1, 2, 6, 4)),
    Function("attention_scale", lambda x: _attention(x, (5, 3), scale=0.8), (1, 2, 6, 4)),
    Function("attention_causal", lambda x: _attention(x, is_causal=True), (1, 2, 6, 4)),
    Function("attention_causal_uneven", lambda x: _attention(x, (3, 6), is_causal=True), (1, 2, 6, 4)),
    Function("attention_boolean_mask", lambda x: _attention(x, attn_mask=_boolean_mask(x)), (1, 2, 6, 4)),
    Function("attention_bias", lambda x: _attention(x, attn_mask=constant(x, 2, 1, 6, seed=4)), (1, 2, 6, 4)),
    Function("attention_infinite_bias", _infinite_bias, (1, 2, 6, 4)),
    Function("softmax_of_masked_scores", _masked_scores),
    Function("attention_differentiable_bias", _differentiable_bias, (1, 2, 6, 4), refusal="attention"),
    Function(
        "attention_grouped",
        lambda x: _attention(x, heads=(4, 2), enable_gqa=True),
        (1, 2, 6, 4),
        refusal="attention",
    ),
    Function("attention_constant_query", _constant_query, (1, 2, 6, 4)),
    Function("attention_constant_keys", _constant_keys, (1, 2, 6, 4)),
    Function("attention_constant_scores", _constant_scores, (1, 2, 6, 4)),
    Function("attention_one_token", lambda x: _attention(x, (1, 1)), (1, 2, 6, 4)),
    Function(
        "attention_three_axes", lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos()), (2, 6, 4)
    ),
    Function(
        "multihead_module",
        _seeded(lambda: _SelfAttention(8, 2, batch_first=True)),
        (2, 3, 8),
        refusal="multi_head|attention",
    ),
    Function(
        "encoder_layer_module",
        _seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        (2, 3, 8),
        refusal="transformer_encoder|attention",
    ),
    Function("through_float32", lambda x: (x.float().sin() * 2).to(x.dtype) + x, tolerance=1e-6),
    Function(
        "mixed_dtypes",
        lambda x: x.half().to(x.dtype).detach() * x + x * torch.arange(5) * torch.tensor(2, dtype=torch.int8),
    ),
    Function("detached_factor", lambda x: x * x.sin().detach()),
    Function("identity", lambda x: x),
    Function("view_of_input", lambda x: x[:, 1:3].transpose(2, 3)),
    Function("read_only_parts", _read_only_parts),
    Function("constant", lambda x: torch.ones(3, 2, dtype=x.dtype)),
    Function("zero_derivative", lambda x: (x > 0).to(x.dtype) + x.detach()),
    Function("scalar_output", lambda x: (x.sin() * x).sum()),
    Function("scalar_input", lambda x: x.sin() * x, ()),
    Function("vector_input", lambda x: torch.outer(x, x.sin()), (5,), refusal="outer"),
    Function("repeated_module_output", lambda x: x.sin().sin().sin() + x.sin()),
]

FUNCTIONS: dict[str, Function] = {function.name: function for function in _FUNCTIONS}
