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
from hmm.range import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
    hmm_pfn_to_pfn,
    hmm_range_fault,
)

__all__ = [
    "HMM_PFN_ERROR",
    "HMM_PFN_REQ_FAULT",
    "HMM_PFN_REQ_WRITE",
    "HMM_PFN_VALID",
    "HMM_PFN_WRITE",
    "HmmRange",
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
    "hmm_pfn_to_pfn",
    "hmm_range_fault",
    "migrate_pfn",
    "migrate_pfn_to_page",
    "migrate_pfn_to_pfn",
    "migrate_vma",
    "migrate_vma_finalize",
    "migrate_vma_pages",
    "migrate_vma_setup",
]
