"""Order: tests that fork come first, since a fork of a process whose threads have worked may never come back."""
FORKING = ("test_processes", "test_interruptions")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FORKING.index(item.path.stem) if item.path.stem in FORKING else len(FORKING))
