"""From a RUN to a BUNDLE: the student as a static graph, proven equal before it gets its name."""
