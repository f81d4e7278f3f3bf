"""Order: tests that fork come first, since a fork of a process whose threads have worked may never come back."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in ("test_interruptions", "test_processes"))
