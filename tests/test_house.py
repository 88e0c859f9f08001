"""The house keeps itself: rules of style and structure that can be read from the source."""

import ast
import re
from pathlib import Path

import pytest

from mm.types import COLUMNS

ROOT = Path(__file__).parents[1]
PACKAGES = ("mm", "hmm", "devices")
MAX_LINES = 520

# Public functions of mm without an original in Linux, by what they are for.
OURS = {
    "the rules of docs/data-model.md, checked": {
        "debug": (
            "verify check_zones check_free_pages check_counts check_flags check_mlocked check_lru "
            "check_swap"
        ),
        "debug_cache": "check_page_cache check_movable check_files",
        "debug_mm": (
            "check_entries check_anon_vmas check_vmas check_notifiers check_userfaultfds "
            "check_tables"
        ),
        "debug_buffer": "check_buffers check_writeback check_super_blocks",
        "debug_memcg": "check_memcgs",
        "census": "take_census used_entries complain dirty_in_tables",
    },
    "vectors, where Linux has one page or a loop": {
        "blockfs_extents": "spread",
        "free_area": "free_pages_sorted free_range in_blocks unique_pfns",
        "highmem": "byte_places reserve_payload",
        "mmap": "vmas_in",
        "mmu_notifier": "call_each",
        "page_cache": "by_mapping",
        "pgtable": "pte_tables",
        "swap": "lru_pages",
        "swapops": "alike swp_type swp_offset",
        "typing": "pages word number",
        "types": "payload_of",
        "uaccess": "access_pages page_range gather_from_user scatter_to_user",
        "vectors": (
            "some every has places distinct unique ascending chosen uniform parted rows frozen "
            "add_at joined pieces nr_pieces stretches set_bits keep_bits integers"
        ),
    },
    "an error, where Linux would try for ever": {"uaccess": "served_in_vain"},
    "text for people": {
        "memparse": "format_size",
        "mempolicy": "show_nodes",
        "page_flags": "describe_flags",
    },
    "tracing as Python has it": {"trace": "names listen to_structlog"},
    "interleavings for tests": {"locking": "install_scheduler alone taking_turns"},
    "shared by the faults and migrate_vma_insert_page()": {"memory": "anon_entries"},
    "what Linux v4.20 promises and does not do": {"migration_ptes": "poison_migration_ptes"},
}


def sources(*packages):
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path):
    return str(path.relative_to(ROOT))


def public_functions(path):
    """{name: docstring} of the functions at the top level of a file."""
    return {
        node.name: ast.get_docstring(node) or ""
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def ours(module):
    """The functions of *module* that OURS excuses."""
    return {name for files in OURS.values() for name in files.get(module, "").split()}


def imported(path):
    """The first part of every module that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def where_is():
    """The rows of the first table of docs/where-is.md."""
    table = (ROOT / "docs" / "where-is.md").read_text().split("\n## ")[1]
    rows = [line.strip("| ").split(" | ", 1) for line in table.splitlines() if line[:2] == "| "]
    return rows[1:]


class TestOriginals:
    @pytest.mark.parametrize("path", sources("mm"), ids=name_of)
    def test_every_public_function_names_its_original(self, path):
        """Who knows Linux finds the function that each one stands for; ours say why they are."""
        functions = public_functions(path)
        nameless = {name for name, doc in functions.items() if "Linux:" not in doc}

        assert set() == nameless - ours(path.stem)

    def test_excuses_are_needed(self):
        """The list holds no function that is gone, or that has found its original."""
        modules = {module for files in OURS.values() for module in files}
        for module in modules:
            functions = public_functions(ROOT / "mm" / f"{module}.py")
            assert set() == {n for n in ours(module) if "Linux:" in functions.get(n, "Linux:")}

    @pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
    def test_every_public_function_says_what_it_does(self, path):
        """One sentence at least."""
        assert [] == [name for name, doc in public_functions(path).items() if not doc]


class TestDataModel:
    @pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
    def test_every_column_is_published(self, column):
        """The grid of docs/data-model.md has a line for it, with its type."""
        lines = (ROOT / "docs" / "data-model.md").read_text().splitlines()
        rows = [line for line in lines if line.startswith(f"| `{column.name}` |")]

        assert 1 == len(rows)
        assert column.dtype.__name__ in rows[0]


class TestWhereIs:
    @pytest.mark.parametrize(("linux", "here"), where_is())
    def test_the_file_named_knows_the_function(self, linux, here):
        """Who goes to the file that the first table names finds the function there."""
        paths = [ROOT / path for path in re.findall(r"`([\w/]+(?:\.py|/))`", here)]
        files = [path for at in paths for path in ([at] if at.is_file() else at.rglob("*.py"))]
        words = set(re.findall(r"\w+", "".join(path.read_text() for path in files)))

        assert paths
        assert set() == set(re.findall(r"`(\w+)\(\)`", linux)) - words


class TestFiles:
    @pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
    def test_one_sitting(self, path):
        """A file can be read in one sitting."""
        assert len(path.read_text().splitlines()) <= MAX_LINES

    def test_all_waiting_is_in_one_file(self):
        """Only mm/locking.py knows threads; a pool of processes shares no machine."""
        waiting = {"threading", "_thread", "asyncio", "multiprocessing", "concurrent"}
        found = [name_of(path) for path in sources(*PACKAGES) if imported(path) & waiting]

        assert ["mm/locking.py", "hmm/script/check.py"] == found
