from tests.world import mapped_range


class TestMigrateVma:
    def test_pinned_page_in_the_middle_stays(self):
        """A pinned page stays in system memory; its neighbours migrate."""
        world = mapped_range(pages=5)
        world.pin(page=2)

        result = world.gpu.to_device(world.process, world.addr, world.nbytes)

        assert [True, True, False, True, True] == world.on_device()
        assert {"pinned": 1} == result.stayed
        assert world.contents()==[0,1,2,3,4]
    def test_locked(self):
        world = mapped_range(pages=5)
        world.lock(1)
        r=world.gpu.to_device(world.process, world.addr, world.nbytes)
        assert {"locked":1}==r.stayed
