"""A stream that is lost is looked for, without haste and without end."""

import pytest

from cdl_edge.errors import InputError
from cdl_edge.streams.source import FIRST_S, LONGEST_S, frames, kind_of
from cdl_edge.streams.video import Video, without_password


def run(source, clock, opened=None, say=None):
    lines = []
    return frames(source, opened or source.open(), clock.pause, say or lines.append, clock), lines


def test_a_camera_that_vanishes_is_found_again_20_times(capture, clock, colours):
    """Each time the driver has nothing for a while: 3 attempts fail, one opens a device that gives no frame."""
    made, lines = [], []
    time = clock(stop_after=20 * 5 + 1)

    def plug():
        turn = len(made) % 5
        made.append(capture([colours["red"]] * 3 if turn == 0 else [], open_=turn in (0, 4)))
        return made[-1]

    source = Video("0", "camera", capture=plug)
    found = list(frames(source, source.open(), time.pause, lines.append, time))
    assert [f.number for f in found] == list(range(1, 3 * 21 + 1))
    assert [f.found_again for f in found] == [i // 3 for i in range(63)]
    waits = [FIRST_S * 2**i for i in range(5)]  # from the start again, each time
    assert time.waits == [*waits * 20, FIRST_S]
    assert lines[:2] == [
        "camera 0: lost after 3 frame(s); looking for it again",
        f"camera 0: found again after {sum(waits):.1f} s",
    ]
    assert len(lines) == 2 * 20  # told to stop the last time: nothing was lost
    assert all(c.released for c in made)


def test_the_waits_grow_and_stay_below_the_longest(capture, clock, colours):
    captures = iter([capture([colours["red"]])])
    source = Video("rtsp://camera/1", "address", capture=lambda: next(captures, capture(open_=False)))
    time = clock(stop_after=12)
    found, _ = run(source, time)
    assert len(list(found)) == 1
    assert time.waits[:7] == [0.5, 1, 2, 4, 8, 16, LONGEST_S] and set(time.waits[6:]) == {LONGEST_S}


def test_a_file_ends_and_is_not_looked_for(capture, clock, colours):
    time = clock()
    source = Video("a.avi", "file", capture=lambda: capture([colours["red"]] * 2, length=2, rate=10))
    found, lines = run(source, time)
    assert [f.shot.seconds for f in found] == [0.0, 0.1]
    assert time.waits == [] and lines == []


def test_a_file_behind_an_address_ends_too(capture, clock, colours):
    source = Video("http://x/a.mp4", "address", capture=lambda: capture([colours["red"]], length=1, rate=10))
    assert len(list(run(source, clock())[0])) == 1


def test_a_file_without_a_frame_is_refused(capture, clock):
    source = Video("a.avi", "file", capture=lambda: capture([]))
    with pytest.raises(InputError, match=r"a\.avi: no frame in it"):
        list(run(source, clock())[0])


def test_a_paced_file_plays_at_its_speed(capture, clock, colours):
    time = clock()
    source = Video("a.avi", "file", None, True, lambda: capture([colours["red"]] * 5, length=5, rate=10), clock=time)
    found, _ = run(source, time)
    begin = time.now
    assert [round(time.now - begin, 3) for _ in found] == [0, 0.1, 0.2, 0.3, 0.4]


def test_frames_of_a_changing_rate_have_their_own_times(capture, clock, colours):
    """Of a phone: 30 a second, then 10. The first of them all is at 0, the last one has no time."""
    time, times = clock(), [0.0, 33.0, 67.0, 167.0, 0.0]
    shots = [colours["red"]] * 5
    source = Video("a.mp4", "file", None, True, lambda: capture(shots, length=5, rate=20, times=times), clock=time)
    found, _ = run(source, time)
    begin = time.now
    played = [(round(f.shot.seconds, 3), round(time.now - begin, 3)) for f in found]
    assert played == [(0, 0), (0.033, 0.033), (0.067, 0.067), (0.167, 0.167), (0.217, 0.217)]


def test_grey_frames_become_three_equal_channels(capture, clock, colours):
    source = Video("0", "camera", capture=lambda: capture([colours["red"][..., 2]]))
    found, _ = run(source, clock(stop_after=1))
    assert [f.shot.picture.shape for f in found] == [(48, 64, 3)]


@pytest.mark.parametrize("kind", ["camera", "address", "file", "pipeline"])
def test_what_cannot_be_opened_is_told_at_once(kind, capture):
    closed = capture(open_=False)
    with pytest.raises(InputError, match="cannot be opened") as caught:
        Video("x", kind, capture=lambda: closed).open()
    assert "do:" in str(caught.value) and closed.released


def test_what_a_name_means(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert kind_of("0") == "camera" and kind_of("/dev/null") == "camera"
    assert kind_of("rtsp://me:secret@host/1") == "address"
    assert kind_of("videotestsrc ! appsink") == "pipeline"
    assert kind_of(str(tmp_path)) == "folder" and kind_of(str(tmp_path / "a.mp4")) == "file"
    with pytest.raises(InputError, match="cdl-edge predict"):
        kind_of(str(tmp_path / "a.jpg"))
    for nothing in (str(tmp_path / "b.mp4"), "", "a\0b"):
        with pytest.raises(InputError, match="the number of a camera"):
            kind_of(nothing)


def test_no_message_has_a_password():
    assert without_password("rtsp://me:secret@10.0.0.1:554/a?b=c") == "rtsp://10.0.0.1:554/a?b=c"
    assert without_password("rtsp://10.0.0.1/a") == "rtsp://10.0.0.1/a"
    assert without_password("a@b.avi") == "a@b.avi"
