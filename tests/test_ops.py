"""Every test here runs for every operator of the registry, on every backend."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from typing import Any

import pytest
import torch
from backends import (
    BACKENDS,
    DEVICES,
    LAYOUTS,
    device_of,
    in_layout,
    maker,
    requiring_grad,
    running,
    with_kwargs,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segfuse import registry
from segfuse.registry import OPS, OpSpec, Sample

SPECS = [pytest.param(spec, id=name) for name, spec in OPS.items()]
SPECS_WITH_OUT = [pytest.param(spec, id=name) for name, spec in OPS.items() if spec.takes_out]
SMOOTH = [pytest.param(spec, id=name) for name, spec in OPS.items() if spec.differentiable]
REORDERED = ("emulated-1", "emulated-2")  # other orders of threads, which no dtype knows of


def on_backends_in_dtypes(wanted: Callable[[OpSpec, torch.dtype], bool]) -> Any:
    """Every operator, dtype and backend; other orders of threads in one dtype alone."""
    cases = []
    for name, spec in OPS.items():
        dtypes = [dtype for dtype in spec.dtypes if wanted(spec, dtype)]
        for dtype, backend in product(dtypes, BACKENDS):
            if backend not in REORDERED or dtype == dtypes[-1]:
                case = f"{name}-{str(dtype)[6:]}-{backend}"
                cases.append(pytest.param(spec, dtype, backend, id=case))
    return pytest.mark.parametrize(("spec", "dtype", "backend"), cases)


LAYOUT_PAIRS = sorted(
    {pair for x in LAYOUTS for pair in ((x, x), (x, "contiguous"), ("contiguous", x))}
)
FEW = 6  # samples, where each takes seconds: an operator yields the most telling first
AUTOCAST_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)
on_backends = pytest.mark.parametrize("backend", BACKENDS)
on_devices = pytest.mark.parametrize("device", DEVICES)


def samples(spec: OpSpec, backend: str, dtype: torch.dtype, **how: Any) -> Iterator[Sample]:
    return spec.samples(maker(backend, dtype, **how))


def smooth(spec: OpSpec, backend: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Samples with a gradient."""
    return (s for s in samples(spec, backend, dtype) if s.differentiable)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def like(result: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or a tuple of them, each made from the result's."""
    return tuple(map(make, result)) if isinstance(result, tuple) else make(result)


def bits(t: Tensor) -> Tensor:
    dense = t.detach().cpu().clone(memory_format=torch.contiguous_format)
    return dense.view(-1).view(torch.uint8) if t.numel() else t.flatten()


def floating(values: Iterable[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def in_dtype(sample: Sample, dtype: torch.dtype) -> Sample:
    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype).requires_grad_(value.requires_grad)
        return value

    return with_kwargs(replace(sample, args=tuple(map(convert, sample.args))), convert)


@dataclass(frozen=True)
class Wanted:
    """A reference's result, and how far another may be from the truth that float64 gives."""

    result: Tensor
    truth: Tensor
    largest_error: float

    def meets(self, got: Tensor, *, exact: bool) -> None:
        assert got.shape == self.result.shape
        assert got.dtype == self.result.dtype
        if exact or not got.is_floating_point() or not got.numel():
            assert torch.equal(bits(got), bits(self.result))
        else:
            assert (got.double() - self.truth).abs().max() <= self.largest_error


def wanted(
    compute: Callable[[Sample], tuple[Tensor, ...]], s: Sample, *, gradient: bool = False
) -> list[Wanted]:
    """At most twice the reference's error, and one ulp of the largest value that goes in or out.

    Of a gradient, an ulp of its own largest value times that of the inputs: where an exponent's
    error is an ulp of the input, that is its factor's relative error.  In float64, where the truth
    is no better than the reference, eight ulps: sums in another order differ by as much.
    """
    wants = []
    largest_input = max(
        [1.0, *(a.detach().abs().max().item() for a in floating(s.args) if a.numel())]
    )
    results = compute(s)
    truths = compute(in_dtype(s, torch.float64)) if floating(s.args) else results
    for result, truth in zip(results, truths, strict=True):
        bound = 0.0
        if result.is_floating_point() and result.numel():
            largest = truth.abs().max().item()
            size = largest * largest_input if gradient else max(largest, largest_input)
            ulps = 8 if result.dtype == torch.float64 else 1
            error = (result.double() - truth).abs().max().item()
            bound = 2 * error + ulps * size * torch.finfo(result.dtype).eps
        wants.append(Wanted(result, truth, bound))
    return wants


def reference(spec: OpSpec, sample: Sample) -> tuple[Tensor, ...]:
    return outputs(spec.function.reference(*sample.args, **sample.kwargs))


def comparable_reference(spec: OpSpec, sample: Sample) -> tuple[Tensor, ...]:
    return spec.comparable(sample, spec.function.reference(*sample.args, **sample.kwargs))


def gradients(outcome: Tensor, sample: Sample, upstream: Tensor) -> tuple[Tensor, ...]:
    values = (*sample.args, *sample.kwargs.values())
    inputs = [a for a in values if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(outcome, inputs, upstream, retain_graph=True)


class _Kept:
    """What references gave, for the backends that come next with the same operator and dtype."""

    def __init__(self) -> None:
        self.of: tuple[Any, ...] = ()
        self.results: dict[Any, Any] = {}

    def __call__(self, of: tuple[Any, ...], key: Any, compute: Callable[[], Any]) -> Any:
        if of != self.of:
            self.of, self.results = of, {}
        if key not in self.results:
            self.results[key] = compute()
        return self.results[key]


kept = _Kept()


@on_backends_in_dtypes(lambda _spec, _dtype: True)
def test_equals_its_reference_in_every_layout(
    spec: OpSpec, dtype: torch.dtype, backend: str
) -> None:
    of = ("equals", spec.name, dtype, device_of(backend))
    for i, sample in enumerate(samples(spec, backend, dtype, bits=spec.exact)):
        alone = sum(isinstance(a, Tensor) for a in (*sample.args, *sample.kwargs.values())) == 1
        for layouts in LAYOUT_PAIRS:
            if alone and layouts[0] != layouts[1]:
                continue
            s = in_layout(sample, layouts)
            wants, kinds = kept(
                of,
                (i, layouts),
                lambda s=s: (
                    wanted(partial(comparable_reference, spec), s),
                    [(t.stride(), t.dtype) for t in reference(spec, s)],
                ),
            )
            with running(backend):
                got = spec.function(*s.args, **s.kwargs)
            for ours, want in zip(spec.comparable(s, got), wants, strict=True):
                want.meets(ours, exact=spec.exact)
            assert [(t.stride(), t.dtype) for t in outputs(got)] == kinds, (s.name, layouts)


@on_backends_in_dtypes(lambda spec, dtype: dtype.is_floating_point and spec.differentiable)
def test_gradients_equal_the_references(spec: OpSpec, dtype: torch.dtype, backend: str) -> None:
    """For a gradient that is dense, and for one that is expanded (as from a sum)."""
    torch.manual_seed(0)
    of = ("gradients", spec.name, dtype, device_of(backend))
    for i, sample in enumerate(smooth(spec, backend, dtype)):
        for layout in ("contiguous", "channels_last", "transposed"):
            s = requiring_grad(in_layout(sample, (layout, layout)))
            (result,) = reference(spec, s)
            weight = torch.randn_like(result, memory_format=torch.contiguous_format)
            spread = LAYOUTS["expanded"](weight)
            for k, upstream in enumerate((weight, LAYOUTS["channels_last"](weight), spread)):

                def compute(s: Sample, upstream: Tensor = upstream) -> tuple[Tensor, ...]:
                    (result,) = reference(spec, s)
                    return gradients(result, s, upstream.to(result.dtype))

                wants = kept(
                    of,
                    (i, layout, k),
                    lambda compute=compute, s=s: wanted(compute, s, gradient=True),
                )
                with running(backend):
                    ours = gradients(spec.function(*s.args, **s.kwargs), s, upstream)
                for a, want in zip(ours, wants, strict=True):
                    want.meets(a, exact=spec.exact)


@on_backends
@pytest.mark.parametrize("spec", SMOOTH)
def test_gradcheck(spec: OpSpec, backend: str) -> None:
    for sample in smooth(spec, backend, torch.float64):
        s = requiring_grad(sample)
        size = sum(a.numel() for a in s.args if isinstance(a, Tensor))
        if all(a.numel() for a in s.args if isinstance(a, Tensor)) and size < 400:
            with running(backend):
                function = partial(spec.function, **s.kwargs)
                assert torch.autograd.gradcheck(function, s.args, fast_mode=True)
                assert torch.autograd.gradgradcheck(function, s.args, fast_mode=True)


class _Calls(TorchDispatchMode):
    """Records the calls of our kernels, so that each can be checked by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "segfuse":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@on_devices
@pytest.mark.parametrize("spec", SPECS)
def test_opcheck(spec: OpSpec, device: str) -> None:
    """PyTorch's own check of schema, fake, autograd and AOT dispatch, for every kernel."""
    seen: Counter[str] = Counter()
    for sample in islice(samples(spec, device, torch.float32), FEW):
        s = requiring_grad(sample)
        with _Calls() as record:
            result = spec.function(*s.args, **s.kwargs)
            if spec.differentiable and s.differentiable:
                result.sum().backward()
            if spec.takes_out:
                with torch.no_grad():
                    spec.function(*s.args, **s.kwargs, out=like(result, torch.empty_like))
        for function, args in record.calls:
            name = function.__name__.split(".")[0]
            seen[name] += 1
            if seen[name] > FEW // 2:
                continue
            asking = requiring_grad(Sample(args)).args if "_out" not in function.__name__ else args
            torch.library.opcheck(function, asking)
    assert seen.keys() >= {kernel.name for kernel in spec.kernels}  # gradients may use others' too


@on_devices
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_compiles_without_a_graph_break(spec: OpSpec, dynamic: bool, device: str) -> None:
    """With the gradient; and to the same bits as eager."""
    for sample in islice(samples(spec, device, torch.float32), FEW):
        torch.compiler.reset()
        s = requiring_grad(sample)
        inputs = [a for a in s.args if isinstance(a, Tensor) and a.requires_grad]
        eager = spec.function(*s.args, **s.kwargs)
        compiled_function = torch.compile(
            spec.function, fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        compiled = compiled_function(*s.args, **s.kwargs)
        for a, b in zip(outputs(compiled), outputs(eager), strict=True):
            assert torch.equal(bits(a), bits(b))
        if not (spec.differentiable and s.differentiable):
            continue
        weight = torch.randn_like(eager)
        for a, b in zip(
            torch.autograd.grad(compiled, inputs, weight),
            torch.autograd.grad(eager, inputs, weight),
            strict=True,
        ):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # inductor's advice on new GPUs
@on_devices
@pytest.mark.parametrize("spec", SPECS)
def test_compiles_with_inductor(spec: OpSpec, device: str) -> None:
    torch.compiler.reset()
    s = next(samples(spec, device, torch.float32))

    def twice(*args: Any) -> Tensor:
        return outputs(spec.function(*args, **s.kwargs))[0] * 2

    assert torch.equal(torch.compile(twice, fullgraph=True)(*s.args), twice(*s.args))


@on_devices
@pytest.mark.parametrize("spec", SPECS)
def test_exports(spec: OpSpec, device: str) -> None:
    s = next(samples(spec, device, torch.float32))

    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return spec.function(*args, **s.kwargs)

    program = torch.export.export(Module(), s.args)
    exported, eager = program.module()(*s.args), spec.function(*s.args, **s.kwargs)
    for a, b in zip(outputs(exported), outputs(eager), strict=True):
        assert torch.equal(bits(a), bits(b))


@on_backends
@pytest.mark.parametrize("spec", SPECS)
def test_failures_raise_and_say_why(spec: OpSpec, backend: str) -> None:
    for s, error, text in spec.failures(maker(backend, torch.float32)):
        out = () if s.kwargs.get("out") is None else outputs(s.kwargs["out"])
        before = [t if t.is_meta else t.clone() for t in out]
        with running(backend), pytest.raises(error) as raised:
            spec.function(*s.args, **s.kwargs)
        assert text in str(raised.value)
        assert str(raised.value).startswith(f"{spec.name}: ")
        for a, b in zip(before, out, strict=True):
            assert b.is_meta or torch.equal(a, b), "written before the check"


@on_backends_in_dtypes(lambda spec, _dtype: spec.takes_out)
def test_out_is_written_in_every_layout(spec: OpSpec, dtype: torch.dtype, backend: str) -> None:
    """And nothing beside it."""

    def over_ones(s: Sample) -> tuple[Tensor, ...]:
        result = like(spec.function.reference(*s.args, **s.kwargs), torch.ones_like)
        return outputs(spec.function.reference(*s.args, **s.kwargs, out=result))

    of = ("out", spec.name, dtype, device_of(backend))
    for i, sample in enumerate(samples(spec, backend, dtype, bits=spec.exact)):
        for inputs in ("contiguous", "channels_last"):
            s = in_layout(sample, (inputs, inputs))
            wants = kept(of, (i, inputs), lambda s=s: wanted(over_ones, s))
            for layout in LAYOUTS:
                if layout == "expanded":
                    continue
                made = [LAYOUTS[layout](torch.zeros_like(want.result)) for want in wants]
                around = [
                    t.as_strided((t.untyped_storage().size() // t.element_size(),), (1,), 0)
                    if t.numel()
                    else t
                    for t in made
                ]
                for whole in around:
                    whole.fill_(1)
                out = made[0] if len(made) == 1 else tuple(made)
                with running(backend):
                    got = spec.function(*s.args, **s.kwargs, out=out)
                for a, t, want, whole in zip(outputs(got), made, wants, around, strict=True):
                    assert a is t
                    want.meets(t, exact=spec.exact)
                    t.fill_(1)
                    assert (whole == 1).all(), "written beside out"


@on_devices
@pytest.mark.parametrize("spec", SPECS_WITH_OUT)
def test_autograd_notices_that_out_was_written(spec: OpSpec, device: str) -> None:
    s = next(samples(spec, device, torch.float32))
    out = spec.function(*s.args, **s.kwargs)
    weight = torch.ones_like(out, dtype=torch.float32, requires_grad=True)
    product_of_both = weight * out  # keeps out for weight's gradient
    spec.function(*s.args, **s.kwargs, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product_of_both.sum().backward()


@on_devices
@pytest.mark.parametrize("spec", SPECS_WITH_OUT)
def test_out_compiles_without_a_graph_break(spec: OpSpec, device: str) -> None:
    torch.compiler.reset()
    s = next(samples(spec, device, torch.float32))
    want = spec.function(*s.args, **s.kwargs)
    out = torch.zeros_like(want)
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    compiled(*s.args, **s.kwargs, out=out)
    assert torch.equal(bits(out), bits(want))


@pytest.mark.parametrize("spec", SPECS)
def test_meta_tensors_give_the_shape(spec: OpSpec) -> None:
    for s in samples(spec, "cpu", torch.float32):
        args = [a.to("meta") if isinstance(a, Tensor) else a for a in s.args]
        kwargs = with_kwargs(s, lambda a: a.to("meta")).kwargs
        got, want = outputs(spec.function(*args, **kwargs)), reference(spec, s)
        assert [(a.shape, a.stride()) for a in got] == [(a.shape, a.stride()) for a in want]
        if spec.takes_out:
            out = spec.function(*args, **kwargs)
            written = spec.function(*args, **kwargs, out=like(out, torch.empty_like))
            assert all(t.is_meta for t in outputs(written))


@on_devices
@pytest.mark.parametrize("spec", SMOOTH)
def test_forward_mode_and_function_transforms(spec: OpSpec, device: str) -> None:
    """Through the reference, which they reach; never silently without a tangent."""
    s = next(samples(spec, device, torch.float64))
    moving = tuple(floating(s.args))
    fixed = s.args[len(moving) :]
    assert not floating(fixed)

    def ours(*args: Any) -> Tensor:
        return spec.function(*args, *fixed, **s.kwargs).sin()

    def theirs(*args: Any) -> Tensor:
        return spec.function.reference(*args, *fixed, **s.kwargs).sin()

    tangents = tuple(map(torch.randn_like, moving))
    torch.testing.assert_close(
        torch.func.jvp(ours, moving, tangents), torch.func.jvp(theirs, moving, tangents)
    )
    with torch.autograd.forward_ad.dual_level():
        dual = map(torch.autograd.forward_ad.make_dual, moving, tangents)
        assert torch.autograd.forward_ad.unpack_dual(ours(*dual)).tangent is not None
    torch.testing.assert_close(
        torch.func.grad(lambda *args: ours(*args).sum())(*moving),
        torch.func.grad(lambda *args: theirs(*args).sum())(*moving),
    )
    with_compile = torch.compile(torch.func.jvp, backend="aot_eager")
    torch.testing.assert_close(
        with_compile(ours, moving, tangents), torch.func.jvp(theirs, moving, tangents)
    )
    stacked = [torch.stack([a, a + 1]) for a in moving]
    torch.testing.assert_close(torch.vmap(ours)(*stacked), torch.vmap(theirs)(*stacked))


@on_devices
@pytest.mark.parametrize("spec", SPECS)
def test_autocast_gives_what_the_reference_gives(spec: OpSpec, device: str) -> None:
    """For dtypes that differ too, where the operator has a rule for them."""
    mixes = any(kernel.autocast for kernel in spec.kernels)
    for sample in samples(spec, device, torch.float32):
        for first, rest in product(AUTOCAST_DTYPES, repeat=2):
            if first != rest and not mixes:
                continue
            if torch.int64 in (first, rest) and not (mixes and torch.int64 in spec.dtypes):
                continue
            dtypes = [first] + [rest] * len(sample.args)
            args = [
                a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a
                for a, dtype in zip(sample.args, dtypes, strict=False)
            ]
            s = Sample(tuple(args), sample.kwargs)
            if not mixes:
                s = with_kwargs(s, lambda a: a.to(first) if a.is_floating_point() else a)  # noqa: B023
            with torch.autocast(device, torch.bfloat16):
                wants = wanted(partial(comparable_reference, spec), s)
                got = spec.comparable(s, spec.function(*s.args, **s.kwargs))
            for a, want in zip(got, wants, strict=True):
                want.meets(a, exact=spec.exact)


@pytest.mark.parametrize("spec", SPECS)
def test_the_reference_runs_where_there_are_no_kernels(
    spec: OpSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_why_no_kernels", lambda _: "as a test")
    monkeypatch.setattr(registry, "_warned", set())
    s = next(samples(spec, "cpu", torch.float32))
    with pytest.warns(UserWarning, match=f"segfuse.ops.{spec.name}: no kernels for cpu"):
        got = spec.function(*s.args, **s.kwargs)
    for a, b in zip(outputs(got), reference(spec, s), strict=True):
        assert torch.equal(bits(a), bits(b))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        spec.function(*s.args, **s.kwargs)


@pytest.mark.parametrize("spec", SPECS)
def test_instruction_sets_and_thread_counts_give_the_same_bits(spec: OpSpec) -> None:
    """Of results and of gradients."""
    from segfuse import _C

    for sample in samples(spec, "cpu", torch.float32):
        with_gradient = spec.differentiable and sample.differentiable
        s = requiring_grad(sample) if with_gradient else sample
        results = []
        for isa, threads in product(_C.isas(), (1, 2)):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            with running(isa):
                result = spec.function(*s.args, **s.kwargs)
                found = [*outputs(result)]
                if with_gradient:
                    found += gradients(result, s, torch.ones_like(result))
            results.append(torch.cat([bits(t) for t in found]))
            torch.set_num_threads(before)
        assert all(torch.equal(results[0], other) for other in results[1:])


@on_devices
@pytest.mark.parametrize("spec", SPECS)
def test_benchmarks_compare_the_same(spec: OpSpec, device: str) -> None:
    """What is timed against each other gives the same result."""
    for benchmark in spec.benchmarks(maker(device, torch.float32)):
        ours, theirs = benchmark.ours(), benchmark.peer()
        if spec.exact:
            assert torch.equal(bits(ours), bits(theirs)), benchmark.name
        else:
            torch.testing.assert_close(ours, theirs)


def test_every_schema_has_a_record() -> None:
    """A schema without one would be an operator without a test."""
    names = torch._C._dispatch_get_all_op_names()
    defined = {name.split("::")[1] for name in names if name.startswith("segfuse::")}
    assert defined == {kernel.name for spec in OPS.values() for kernel in spec.kernels}


def test_every_operator_is_public_and_documented() -> None:
    from segfuse import ops

    made = {"bilinear_kernel", "random_deformation"}  # what operators take
    assert set(ops.__all__) == set(OPS) | made
    for name, spec in OPS.items():
        assert getattr(ops, name) is spec.function
        for word in ("Args:", "Returns:", "Raises:"):
            assert word in (spec.function.__doc__ or "")


def test_backends() -> None:
    """The emulated CUDA is tested unless this is an installed copy without it."""
    assert device_of("cuda") == "cuda"
    if not any(name.startswith("emulated") for name in BACKENDS):
        pytest.skip("built without SEGFUSE_EMULATED=ON: the CUDA sources were not run")
