"""Products by hopper.cu and by cuBLASLt's algorithms against float64, and the engine that chooses among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.engine.kernels import cublaslt, hopper
from orchestrator.engine.kernels.gated import gated_many
from orchestrator.engine.kernels.hopper import MANY, Tile
from orchestrator.engine.product_choice import CUBLAS, alike, choose, places
from tests.engine import LocalWorker, greedy_requests, limits, relative_l2
from tests.serving import options
from tests.tiny import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
ERROR = {
    torch.bfloat16: 2e-3,
    torch.float16: 3e-4,
}  # relative L2 of what is rounded once: 2⁻⁹/√3 and 2⁻¹²/√3 or so


@pytest.fixture(autouse=True)
def hopper_only() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("hopper.cu is for GPUs of compute capability 9.0")
    torch.zeros(1, device="cuda")  # the thread has a context then, as a worker's has


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def made_for(tile: Tile, dtype: torch.dtype) -> hopper.Product:
    return hopper.Product(tile, hopper.binaries([tile], dtype)[tile], torch.device("cuda"))


def truth(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    product = x.double() @ weight.double().T
    if not gated:
        return product
    gate, up = product.chunk(2, dim=-1)
    return F.silu(gate) * up


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = relative_l2(actual.double(), expected)
    assert error < ERROR[actual.dtype], f"relative L2 {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "split", "share"),
    [(64, 48, 1, 1), (64, 256, 8, 1), (128, 96, 2, 2), (128, 224, 1, 2), (192, 128, 4, 2), (256, 128, 4, 2)],
)
def test_few_rows(dtype: torch.dtype, gated: bool, rows: int, columns: int, split: int, share: int) -> None:
    torch.manual_seed(0)
    tile = Tile(rows, columns, split, share, gated)
    assert tile.possible
    product = made_for(tile, dtype)
    for m, n, k in [(rows, 4096, 4096), (rows - 63, 1040, 1032), (rows - 1, 2 * columns * share, 14336)]:
        x, weight = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5
        made = product(x, weight)
        assert_near(made, truth(x, weight, gated))
        assert torch.equal(product(x, weight), made), "the same product twice"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1024, 28672, 4096), (1111, 1040, 1032), (5000, 2048, 2048)])
def test_many_rows(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    torch.manual_seed(0)
    x, weight = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5
    for product in (made_for(MANY, dtype), gated_many):
        made = product(x, weight)
        assert_near(made, truth(x, weight, gated=True))
        assert torch.equal(product(x, weight), made), "the same product twice"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_algorithm_of_cublaslt(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    found = cublaslt.Library(torch.device("cuda")).algorithms(128, 4096, 14336, dtype, 8)
    assert len(found) > 1
    weight = randn(4096, 14336, dtype=dtype) / 14336**0.5
    for m in (128, 65, 3):  # each serves others than what it was proposed for
        x = randn(m, 14336, dtype=dtype)
        expected = truth(x, weight, gated=False)
        for product in found:
            assert_near(product(x, weight), expected)


def test_a_chain_in_a_graph_waits_for_what_it_reads() -> None:
    """Kernels start before the ones before them have ended, and must wait for x themselves."""
    torch.manual_seed(0)
    dtype, wide = torch.bfloat16, 4096
    products = [made_for(Tile(128, 96, 2, 2), dtype),
                made_for(Tile(128, 128, 4, 2), dtype)]  # fmt: skip
    weights = [randn(wide, wide, dtype=dtype) / wide**0.5 for _ in range(6)]
    x = randn(128, wide, dtype=dtype)

    def chain() -> Tensor:
        y = x
        for i, weight in enumerate(weights):
            y = products[i % 2](y, weight)
        return y

    expected = chain()
    by_torch = x
    for weight in weights:
        by_torch = F.linear(by_torch, weight)
    assert relative_l2(expected.double(), by_torch.double()) < 0.02
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = chain()
    for _ in range(50):
        x.add_(0.0)
        graph.replay()
    assert torch.equal(made, expected)


def test_the_engine_chooses_and_graphs_still_change_no_bit(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    sizes = {
        "vocab_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    make_model(tmp_path, "llama", std=0.05, **shape, **sizes)
    asked = options(
        tmp_path, device="cuda", dtype="bfloat16", max_model_len=400, max_num_seqs=32, max_num_batched_tokens=2048,
        block_size=16, num_blocks=64,
    )  # fmt: skip
    worker = LocalWorker(asked)
    model = worker.model
    for kind, layers in alike(model).items():
        assert all(layer.ways == () for layer in layers), kind
    path, reason = worker.choose_products()
    assert reason
    chosen = {way.rows for layers in alike(model).values() for layer in layers for way in layer.ways}
    assert chosen <= {place.rows for place in places(2048)}
    assert (path == CUBLAS) == (not chosen), reason
    worker.allocate(limits(asked, run_ahead=True))
    eager = worker.answers(greedy_requests(asked.spec.vocab))
    worker.capture()
    replayed = worker.answers(greedy_requests(asked.spec.vocab))
    for one, other in zip(eager, replayed, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.equal(one.logits_NV, other.logits_NV)


def test_another_type_goes_by_cublas(tmp_path: Path) -> None:
    make_model(tmp_path, "llama", vocab_size=64, hidden_size=64, num_hidden_layers=1)
    worker = LocalWorker(options(tmp_path, device="cuda", dtype="float32"))
    found = choose(worker.model, 2048, torch.float32, torch.device("cuda"), alone=True)
    assert found.path == CUBLAS
    assert "float32" in found.reason
