"""Who gets what a long command tells on its way."""

from __future__ import annotations

import logging
from threading import Thread

from cdl_edge.log import LOG, told


def test_the_one_that_listens_last_gets_the_lines():
    outer, inner = [], []
    LOG.info("nobody listens")
    with told(outer.append):
        LOG.info("one")
        with told(inner.append), told(None):
            LOG.warning("two")
        LOG.debug("too much")
        LOG.info("three")
    LOG.info("nobody any more")
    assert (outer, inner) == (["one", "three"], ["warning: two"])


def test_threads_do_not_get_each_others_lines():
    mine, others = [], []

    def other():
        with told(others.append):
            LOG.info("theirs")

    with told(mine.append):
        thread = Thread(target=other)
        thread.start()
        thread.join()
        LOG.info("mine")
    assert (mine, others) == (["mine"], ["theirs"])


def test_a_program_with_logging_of_its_own_gets_them_too(caplog):
    with caplog.at_level(logging.INFO):
        LOG.info("a step")
    assert [(r.name, r.getMessage()) for r in caplog.records] == [("cdl_edge", "a step")]


def test_a_server_gets_the_lines_of_its_threads_but_not_those_that_another_listens_to():
    mine, others = [], []

    def other():
        LOG.info("nobody else listens")
        with told(others.append):
            LOG.info("theirs")

    with told(mine.append, threads=True):
        thread = Thread(target=other)
        thread.start()
        thread.join()
        LOG.info("mine")
    LOG.info("nobody any more")
    assert (mine, others) == (["nobody else listens", "mine"], ["theirs"])
