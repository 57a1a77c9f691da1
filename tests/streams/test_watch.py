"""`cdl-edge watch`: a video, a camera that vanishes, a folder; from the command line and from Python."""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from cdl_edge import api
from cdl_edge.errors import InputError
from cdl_edge.runtime.policy import open_policy
from cdl_edge.streams import source as source_module
from cdl_edge.streams import video as video_module
from cdl_edge.streams.video import Video
from cdl_edge.streams.watch import source_of, watch


def lines_of(answer):
    return [json.loads(line) for line in answer.out.splitlines()]


def png(colour):
    stream = io.BytesIO()
    Image.new("RGB", (20, 16), colour).save(stream, "PNG")
    return stream.getvalue()


# -- a video ----------------------------------------------------------------------------------------------------------


def test_every_frame_of_a_video(tmp_path, bundle, make_video, cli):
    names = ["red"] * 5 + ["green"] * 4 + ["blue"] * 3
    video = make_video(tmp_path / "video.avi", names)
    done = cli("watch", video, bundle.path, "--json", "--threads", "1")
    assert done.code == 0, done.err
    answers = lines_of(done)
    assert [a["label"] for a in answers] == names
    assert [a["frame"] for a in answers] == list(range(1, 13))
    assert [a["seconds"] for a in answers] == [round(i / 25, 3) for i in range(12)]
    assert {a["left_out"] for a in answers} == {0} and {a["image"] for a in answers} == {None}
    assert answers[0]["path"] == "single" and len(answers[0]["prompts"]["selected"]) == 4
    assert re.fullmatch(r"12 frame\(s\) classified in .* 0 left out, lost and found 0 time\(s\)\n", done.err)


def test_a_line_for_people_and_only_changes(tmp_path, bundle, make_video, cli):
    video = make_video(tmp_path / "video.avi", ["red"] * 5 + ["green"] * 4 + ["red"] * 3)
    done = cli("watch", video, bundle.path, "--on-change")
    assert [line.split(" (")[0] for line in done.out.splitlines()] == [
        "0.00 s frame 1: red",
        "0.20 s frame 6: green",
        "0.36 s frame 10: red",
    ]
    assert "confidence" in done.out and "12 frame(s)" in done.err


def test_the_pixels_are_those_that_predict_sees(tmp_path, bundle, make_video):
    cv2 = pytest.importorskip("cv2")
    video = make_video(tmp_path / "video.avi", ["red", "blue"])
    capture = cv2.VideoCapture(str(video))
    frames = [capture.read()[1][..., ::-1] for _ in range(2)]
    wanted = api.predict(bundle.path, frames)["predictions"]
    for answer, prediction in zip(api.watch(video, bundle.path), wanted, strict=True):
        for key in ("label", "index", "probability", "confidence", "unknown", "task", "prompts", "path"):
            assert answer[key] == prediction[key], key


def test_as_many_frames_as_asked_for_and_nothing_runs_on(tmp_path, bundle, make_video):
    video = make_video(tmp_path / "video.avi", ["red"] * 50)
    assert len(list(api.watch(video, bundle.path, frames=7))) == 7
    answers = api.watch(video, bundle.path)
    next(answers)
    answers.close()
    assert [t for t in threading.enumerate() if t.name == "ahead"] == []


def test_a_policy_is_kept_over_the_frames(tmp_path, bundle, make_video, cli):
    video = make_video(tmp_path / "video.avi", ["red"] * 3)
    done = cli("watch", video, bundle.path, "--policy", "sticky", "--json")
    assert {a["path"] for a in lines_of(done)} == {"single"}  # a student of one pass: every policy is exact
    cli("watch", video, bundle.path, "--policy", "stocky").assert_refused("stocky", "sticky")
    done = cli("watch", video, bundle.path, "--task", "2", "--json")
    assert {a["label"] for a in lines_of(done)} <= {"blue", "grey"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nothing.mp4",), "no such source"),
        (("notes.mp4",), "no video in it"),
        (("picture.jpg",), "cdl-edge predict"),
        (("notes.mp4", "--take", "some"), "take"),
    ],
)
def test_bad_sources_are_one_message(words, told, tmp_path, bundle, cli, monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.mp4").write_text("this is no video")
    (tmp_path / "picture.jpg").write_bytes(b"x")
    cli("watch", words[0], bundle.path, *words[1:]).assert_refused(told)


def test_without_opencv_one_line_names_the_extra(tmp_path, bundle, cli, monkeypatch):
    (tmp_path / "video.avi").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "cv2", None)
    done = cli("watch", tmp_path / "video.avi", bundle.path)
    assert done.code == 2
    assert done.err == "error: `watch` needs cv2, of the extra `watch`: pip install 'cdl-edge[watch]'\n"
    monkeypatch.setattr(video_module, "on_jetson", lambda: True)
    cli("watch", tmp_path / "video.avi", bundle.path).assert_refused("python3-opencv", "--system-site-packages")


def test_a_pipeline_needs_an_opencv_with_gstreamer(bundle, cli):
    cv2 = pytest.importorskip("cv2")
    if cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        pytest.skip("this OpenCV has it")
    cli("watch", "videotestsrc ! appsink", bundle.path).assert_refused("no GStreamer", "python3-opencv")


# -- a camera ---------------------------------------------------------------------------------------------------------


def watched(bundle, captures, newest=False, **options):
    """(answers, what was said) about a camera that is plugged in again and again."""
    left, said = iter(captures), []
    camera = Video("0", "camera", capture=lambda: next(left))
    options.setdefault("student", open_policy(bundle, threads=1))
    return watch(options.pop("student"), camera, camera.open(), newest, say=said.append, **options), said


def test_a_camera_that_vanishes_and_comes_again(bundle, capture, colours, monkeypatch):
    monkeypatch.setattr(source_module, "FIRST_S", 0.0)
    captures = [capture([colours[c]] * 2, open_=True) for c in ("red", "green", "blue")]
    captures[1:1] = [capture(open_=False), capture()]
    answers, said = watched(bundle, captures, count=6)
    found = list(answers)
    assert [a["label"] for a in found] == ["red"] * 2 + ["green"] * 2 + ["blue"] * 2
    assert [a["found_again"] for a in found] == [0, 0, 1, 1, 2, 2]
    assert [re.sub(r"\d+\.\d", "-", line) for line in said[:2]] == [
        "camera 0: lost after 2 frame(s); looking for it again",
        "camera 0: found again after - s",
    ]
    assert "lost and found 2 time(s)" in said[-1]
    assert all(c.released for c in captures)


def test_a_stream_that_was_lost_is_another_scene(bundle, capture, colours, monkeypatch):
    monkeypatch.setattr(source_module, "FIRST_S", 0.0)
    student = open_policy(bundle, threads=1)
    forgotten = []
    monkeypatch.setattr(student, "forget", lambda: forgotten.append(1))
    captures = [capture([colours["red"]] * 2) for _ in range(2)]
    answers, _ = watched(bundle, captures, student=student, count=4)
    assert len(list(answers)) == 4 and len(forgotten) == 1


def test_of_a_camera_the_newest_frame_counts(bundle, capture, colours):
    """While the first answer is being read the camera goes on: red is over, green is over, blue is now."""
    first, over = threading.Event(), threading.Event()

    def shots():
        yield colours["red"]
        first.wait(5)
        for _ in range(3):
            yield colours["green"]
        yield colours["blue"]
        over.set()
        threading.Event().wait(0.01)

    answers, said = watched(bundle, [capture(shots())], newest=True, count=2)
    assert next(answers)["label"] == "red"
    first.set()
    assert over.wait(5)
    last = next(answers)
    assert (last["label"], last["frame"], last["left_out"]) == ("blue", 5, 3)
    assert list(answers) == [] and "3 left out" in said[-1]


def test_which_frames_count_by_default(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    given = {"0": True, "rtsp://x/1": True, "a ! b": True, str(tmp_path): False, str(tmp_path / "a.mp4"): False}
    assert {name: source_of(name)[1] for name in given} == given
    assert source_of("0", "all")[1] is False and source_of(tmp_path, "newest")[1] is True
    assert source_of(0)[0].name == "camera 0"
    with pytest.raises(InputError, match="take"):
        source_of("0", "some")


# -- a folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_being_filled(tmp_path, bundle, monkeypatch):
    from cdl_edge.streams import folder as folder_module

    monkeypatch.setattr(folder_module, "LOOK_S", 0.01)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(png("red"))
    said = []
    answers = api.watch(tmp_path / "in", bundle.path, frames=3, threads=1, say=said.append)
    assert (found := next(answers))["label"] == "red" and found["image"] == str(tmp_path / "in" / "1.png")
    (tmp_path / "in" / "2.png").write_bytes(b"no picture")
    (tmp_path / "in" / "3.png").write_bytes(png("blue"))
    assert next(answers)["label"] == "blue"
    assert "2.png" in said[0] and said[0].startswith("left out: ")
    (tmp_path / "in" / "2.png").write_bytes(png("lime"))  # whole now
    assert next(answers)["label"] == "green"
    assert list(answers) == []


def test_ctrl_c_ends_it_as_a_wish(tmp_path, bundle, make_video, cli, monkeypatch):
    import click

    video = make_video(tmp_path / "video.avi", ["red"] * 20)
    shown, echo = [], click.echo

    def interrupted(line, **options):
        if not options.get("err"):
            shown.append(line)
            if len(shown) == 3:
                raise KeyboardInterrupt
        echo(line, **options)

    monkeypatch.setattr("cdl_edge.cli_watch.click.echo", interrupted)
    done = cli("watch", video, bundle.path)
    assert done.code == 0 and "3 frame(s) classified" in done.err and "Traceback" not in done.err


@pytest.mark.slow
def test_a_signal_while_nothing_comes(tmp_path, bundle):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(png("red"))
    words = [sys.executable, "-m", "cdl_edge.cli", "watch", tmp_path / "in", bundle.path]
    # A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        assert "red" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and "1 frame(s) classified" in err and "Traceback" not in err


# -- for long ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_over_10_000_frames(tmp_path, bundle, make_video):
    psutil = pytest.importorskip("psutil")
    video = make_video(tmp_path / "video.avi", ["red", "green", "blue", "red"] * 2_500)
    process, used = psutil.Process(), {}
    for answer in api.watch(video, bundle.path, threads=1):
        if answer["frame"] % 1_000 == 0:
            used[answer["frame"]] = process.memory_info().rss
    assert list(used) == list(range(1_000, 10_001, 1_000))
    assert used[10_000] - used[2_000] < 4 << 20, used  # 8,000 frames of 9 kB would be 70 MB


SERVER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer(address="127.0.0.1", service=sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory(shared=True)
factory.set_launch("( videotestsrc is-live=true pattern=red ! video/x-raw,format=I420,width=64,height=48 "
                   "! jpegenc ! rtpjpegpay name=pay0 )")
server.get_mount_points().add_factory("/red", factory)
server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
"""


@pytest.fixture
def rtsp():
    """(address, start, stop) of a server of GStreamer on the loopback."""
    pytest.importorskip("cv2")
    python = next((p for p in (shutil.which("python3", path="/usr/bin"), sys.executable) if p and gstreamer(p)), None)
    if python is None:
        pytest.skip("no RTSP server: apt-get install gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-good")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    running = []

    def start():
        running.append(subprocess.Popen([python, "-c", SERVER, port], stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "ready\n"

    def stop():
        process = running.pop()
        process.kill()
        process.wait()
        process.stdout.close()

    yield f"rtsp://127.0.0.1:{port}/red", start, stop
    while running:
        stop()


def gstreamer(python):
    code = SERVER.split("server =")[0] + "sys.exit(not all(map(Gst.ElementFactory.find, ('jpegenc', 'rtpjpegpay'))))"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_stream_of_the_network_that_goes_and_comes(bundle, rtsp, monkeypatch):
    monkeypatch.setattr(video_module, "TIMEOUT_MS", 6_000)
    address, start, stop = rtsp
    with pytest.raises(InputError, match="cannot be opened"):
        api.watch(address, bundle.path)
    start()
    said = []
    answers = api.watch(address, bundle.path, threads=1, say=said.append)
    assert [next(answers)["label"] for _ in range(5)] == ["red"] * 5
    stop()
    again = threading.Timer(3, start)
    again.start()
    begin = time.monotonic()
    while (answer := next(answers))["found_again"] == 0:
        assert time.monotonic() - begin < 60
    again.join()
    assert answer["label"] == "red" and answer["seconds"] is None
    answers.close()
    assert "lost after" in said[0] and "found again" in said[1] and "lost and found 1 time(s)" in said[-1]


def test_black_and_white_cameras_and_all_sizes(bundle, capture):
    sizes = [(48, 64, 3), (1, 1, 3), (600, 8, 3), (48, 64)]
    shots = [np.full(size, 200, np.uint8) for size in sizes]
    answers, _ = watched(bundle, [capture(shots)], count=4)
    assert [a["label"] for a in answers] == ["grey"] * 4
