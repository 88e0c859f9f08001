"""The stages of migrate_vma() for one page after another, to be read beside hmm/migrate.py.

Each function takes the `State` before its stage and gives the one after it. Nothing is a vector
here and nothing is clever; where a stage of hmm/migrate.py and its twin do not agree, one of the
two is wrong.

    31                 6  5     4      3     2      1      0
    |       PFN         |ERROR|DEVICE|WRITE|LOCKED|MIGRATE|VALID|
"""

from __future__ import annotations

from copy import deepcopy

from tests.reference.state import Entry, Page, State

VALID, MIGRATE, LOCKED, WRITE, DEVICE, ERROR = (1 << bit for bit in range(6))


def migrate_vma_collect(before: State) -> State:
    """Name every page of the range in src; lock and unmap those whose lock is free."""
    state = deepcopy(before)
    pages = len(state.src)
    state.src, state.dst, state.stayed = [0] * pages, [0] * pages, ["SKIPPED"] * pages
    state.held = set()
    for i in range(pages):
        entry = state.entry(i)
        if not state.wanted[i]:
            continue
        if entry.kind == "none" or (entry.kind == "zero" and "SYSTEM" in state.select):
            state.src[i], state.stayed[i] = MIGRATE, "NO"
        elif _selected(state, entry):
            state.src[i], state.stayed[i] = _collect_page(state, i, entry), "NO"
    return state


def _selected(state: State, entry: Entry) -> bool:
    if entry.kind not in ("present", "device"):
        return False  # already moving, with a device, or lost
    page = state.pages[entry.pfn]
    if page.on_device:
        kind = "DEVICE_COHERENT" if page.public else "DEVICE_PRIVATE"
        chosen = kind in state.select and state.owner in (None, page.zone)
    else:
        chosen = "SYSTEM" in state.select
    return chosen and page.mapping != 0


def _collect_page(state: State, i: int, entry: Entry) -> int:
    page = state.pages[entry.pfn]
    word = entry.pfn << 6 | VALID | MIGRATE
    if entry.write:
        word |= WRITE
    if page.private:
        word |= DEVICE
    page.refcount += 1  # ours, so that it cannot go away
    if "locked" not in page.flags:
        _lock(state, page)
        word |= LOCKED
        _unmap(state, state.address(i))
    return word


def migrate_vma_prepare(before: State) -> State:
    """Lock the rest, take every page off the LRU, put back what is pinned."""
    state = deepcopy(before)
    for i, word in enumerate(state.src):
        if not word & VALID:
            continue
        page = state.pages[word >> 6]
        if not word & LOCKED:
            if "locked" in page.flags:
                _stay(state, i, "LOCKED")
                _put(state, word >> 6)
                continue
            _lock(state, page)
            state.src[i] |= LOCKED
        if not page.on_device:
            if "lru" not in page.flags:
                _restore(state, i, "ISOLATED")
                continue
            page.flags.remove("lru")
            page.refcount += 1  # who isolates a page holds it
            page.refcount -= 1  # collect's reference has done its work
        if _pinned(page):
            _restore(state, i, "PINNED")
    return state


def migrate_vma_unmap(before: State) -> State:
    """Unmap what collect could not lock, and look for pins again."""
    state = deepcopy(before)
    for i, word in enumerate(state.src):
        if not word & VALID:
            continue
        pfn, page = word >> 6, state.pages[word >> 6]
        for addr, entry in list(state.entries.items()):
            if entry.kind in ("present", "device") and entry.pfn == pfn:
                _unmap(state, addr)
        if _pinned(page):
            _restore(state, i, "PINNED")
        elif page.public and _strangers(page):
            state.held.add(pfn)
    return state


def migrate_vma_pages(before: State) -> State:
    """Let the pages of dst take over from those of src, and map them into the holes."""
    state = deepcopy(before)
    for i, word in enumerate(state.src):
        if not word & MIGRATE:
            continue
        answer = state.dst[i]
        if word & VALID and answer & ERROR:
            why = "LOST"
        elif not answer & VALID:
            why = "NOT_CHOSEN"
        elif not word & VALID:
            why = _insert_page(state, i, answer >> 6)
        elif word >> 6 in state.held:
            why = "BUSY"
        else:
            why = _migrate_page(state.pages[answer >> 6], state.pages[word >> 6])
        if why != "NO":
            state.src[i] &= ~MIGRATE
            state.stayed[i] = why
    return state


def _insert_page(state: State, i: int, pfn: int) -> str:
    """Map *pfn* where nothing is, or only the zero page."""
    if state.anon_vma is None:
        state.anon_vma = state.next_anon_vma
        state.next_anon_vma += 1
    if state.entry(i).kind not in ("none", "zero"):
        return "RACED"
    page = state.pages[pfn]
    page.refcount += 1
    page.mapcount = 1
    page.mapping = state.anon_vma << 2 | 1
    page.index = state.vm_pgoff + (state.address(i) - state.vm_start) // 4096
    page.flags |= {"anon_exclusive", "swapbacked", "uptodate"}
    if page.private:
        entry = Entry("device", pfn, write=state.writable)
    else:
        entry = Entry("present", pfn, write=state.writable, accessed=True, devmap=page.public)
        if state.writable:
            entry.dirty = entry.soft_dirty = True
    if not page.on_device:
        page.flags |= {"active", "lru"}
    state.entries[state.address(i)] = entry
    state.anon_rss += 1
    return "NO"


def _migrate_page(new: Page, old: Page) -> str:
    """*new* becomes what *old* was, if nobody but the migration holds *old*."""
    if old.refcount != 1 + old.on_device:
        return "BUSY"
    new.mapping, new.index = old.mapping, old.index
    new.flags |= old.flags & {
        "active",
        "anon_exclusive",
        "dirty",
        "referenced",
        "swapbacked",
        "unevictable",
        "uptodate",
    }
    old.flags -= {"active", "unevictable"}
    return "NO"


def migrate_vma_finalize(before: State) -> State:
    """Map what moved at its new place, the rest at the old one; unlock and let go of all."""
    state = deepcopy(before)
    for i, (word, answer) in enumerate(zip(state.src, state.dst, strict=True)):
        moved = bool(word & MIGRATE and answer & VALID)
        if word & VALID:
            _finalize_source(state, i, word >> 6, answer >> 6 if moved else word >> 6)
        if answer & VALID:
            page = state.pages[answer >> 6]
            _unlock(page)
            if moved and word & VALID and not page.on_device:
                page.flags.add("lru")
            _put(state, answer >> 6)
    return state


def _finalize_source(state: State, i: int, old: int, new: int) -> None:
    page = state.pages[old]
    _unlock(page)
    if state.stayed[i] == "LOST":
        state.entries[state.address(i)] = Entry("poison", old)
        state.anon_rss -= 1
    else:
        _map_again(state, old, new)
        if new == old and not page.on_device:
            page.flags.add("lru")
    _put(state, old)


# What several stages do.


def _lock(state: State, page: Page) -> None:
    page.flags.add("locked")
    page.lock_owner = state.me


def _unlock(page: Page) -> None:
    page.flags.remove("locked")
    page.lock_owner = 0


def _put(state: State, pfn: int) -> None:
    """One reference less; a page that nobody uses is out of the picture."""
    page = state.pages[pfn]
    page.refcount -= 1
    if page.refcount == page.on_device:
        del state.pages[pfn]


def _strangers(page: Page) -> int:
    """References that are neither mappings, nor ours, nor the one of a free device page."""
    return page.refcount - page.mapcount - 1 - page.on_device


def _pinned(page: Page) -> bool:
    """Somebody else holds it. Of private pages nobody asks here: only waiters hold them."""
    return not page.private and _strangers(page) > page.public


def _unmap(state: State, addr: int) -> None:
    """A migration entry in place of a mapping, whose reference goes."""
    entry = state.entries[addr]
    page = state.pages[entry.pfn]
    if entry.dirty:
        page.flags.add("dirty")
    page.mapcount -= 1
    page.refcount -= 1
    state.entries[addr] = Entry(
        "migration", entry.pfn, write=entry.write, soft_dirty=entry.soft_dirty
    )


def _map_again(state: State, old: int, new: int) -> None:
    """A mapping of *new* in place of every migration entry for *old*."""
    page = state.pages[new]
    for addr, entry in state.entries.items():
        if entry.kind == "migration" and entry.pfn == old:
            state.entries[addr] = Entry(
                "device" if page.private else "present",
                new,
                write=entry.write and state.writable,
                soft_dirty=entry.soft_dirty,
                devmap=page.public,
            )
            page.mapcount += 1
            page.refcount += 1


def _restore(state: State, i: int, why: str) -> None:
    """The page of entry *i* stays: as if nothing had been, but for the accessed bit."""
    pfn = state.src[i] >> 6
    page = state.pages[pfn]
    _map_again(state, pfn, pfn)
    _unlock(page)
    if why != "ISOLATED":
        page.flags.add("lru")
    _stay(state, i, why)
    _put(state, pfn)


def _stay(state: State, i: int, why: str) -> None:
    state.src[i] = 0
    state.stayed[i] = why
