"""HMM: device-memory migration over the mm core, as of Linux v4.20.

Read hmm/migrate.py first; it is the five stages in the order in which they run.
"""

from hmm.migrate import (
    migrate_vma,
    migrate_vma_finalize,
    migrate_vma_pages,
    migrate_vma_setup,
)
from hmm.migrate_pfn import (
    MIGRATE_PFN_DEVICE,
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    Stayed,
    migrate_pfn,
    migrate_pfn_to_page,
    migrate_pfn_to_pfn,
)
from hmm.migration import MigrateVma, MigrateVmaOps, MigrateVmaSelect

__all__ = [
    "MIGRATE_PFN_DEVICE",
    "MIGRATE_PFN_ERROR",
    "MIGRATE_PFN_LOCKED",
    "MIGRATE_PFN_MIGRATE",
    "MIGRATE_PFN_VALID",
    "MIGRATE_PFN_WRITE",
    "MigrateVma",
    "MigrateVmaOps",
    "MigrateVmaSelect",
    "Stayed",
    "migrate_pfn",
    "migrate_pfn_to_page",
    "migrate_pfn_to_pfn",
    "migrate_vma",
    "migrate_vma_finalize",
    "migrate_vma_pages",
    "migrate_vma_setup",
]
