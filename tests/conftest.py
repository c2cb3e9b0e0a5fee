"""Where tests run: `pytest --device cuda` puts every tensor that is not told otherwise on a GPU."""

import os
import sys

import pytest
import torch
import typecheck  # noqa: F401, before the first module of fastgen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="torch's default device for the tests: cpu or cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first, though its tests are few: no other process waits for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_smollm2.py")


def pytest_configure(config: pytest.Config) -> None:
    # Most tensors here are tiny, and threads that wait for a core spin: one for each process, those of tests included.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if config.getoption("--device") == "cpu":
        if "triton" in sys.modules:
            raise pytest.UsageError("triton was imported before TRITON_INTERPRET=1 was set")
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels run as Python
    else:
        # Types are checked while tests run on the CPU only: torch.compile cannot trace the checks.
        config.addinivalue_line("filterwarnings", "default")  # and it has warnings of its own
        sys.meta_path[:] = [x for x in sys.meta_path if type(x).__module__ != "jaxtyping._import_hook"]
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")
