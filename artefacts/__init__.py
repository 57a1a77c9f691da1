"""What the commands hand to each other: the RUN, the BUNDLE and their records, read and checked once, as dataclasses.

It imports no other room: numpy and the root's modules only, so that every room can read every artefact.
"""
