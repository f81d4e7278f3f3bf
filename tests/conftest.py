"""Tests that fork come first: a fork of a process whose threads have worked may never come back."""

def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem != "test_processes")
