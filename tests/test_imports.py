"""The direction of import, pallas_kernels <- jattn <- jattn.nn <- jattn.models <- train, and a light `import jattn`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("pallas_kernels", "jattn", "train") for path in (ROOT / package).rglob("*.py"))


def layer(module: str) -> int | None:
    """How high a module stands, or `None` for one that is not of this project."""
    for height, prefix in ((4, "train"), (3, "jattn.models"), (2, "jattn.nn"), (1, "jattn"), (0, "pallas_kernels")):
        if module == prefix or module.startswith(prefix + "."):
            return height
    return None


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for module in imports(path):
        height = layer(module)
        assert height is None or height <= own, f"{path} imports {module}"
        if own <= 1:
            assert module.split(".")[0] != "flax", f"{path} imports {module}"


def test_import_jattn_is_light():
    code = "import sys, jattn; print(sorted({name.split('.')[0] for name in sys.modules} & {'jax', 'flax', 'numpy'}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_every_public_name_loads():
    import jattn

    assert all(getattr(jattn, name) is not None for name in jattn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'flash_attention'"):
        _ = jattn.flash_attention
