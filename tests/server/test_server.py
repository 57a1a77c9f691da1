"""What a server does beside answering requests."""

from cdl_edge.runtime import open_bundle


def test_a_look_at_the_disk_keeps_nobody_from_changing_it(make_server, monkeypatch):
    """A client that sends one change after another got 409 for the second: the watch was looking at the first."""
    server = make_server()
    locked = []

    def look(*arguments, **options):
        locked.append(server.changing.locked())
        return open_bundle(*arguments, **options)

    monkeypatch.setattr("cdl_edge.server.server.open_bundle", look)
    server.follow()
    assert locked == [False]
