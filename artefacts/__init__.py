"""What the commands hand to each other: the RUN, the BUNDLE and their records, read and checked once, as dataclasses.

It imports no other package of this one: numpy and the root's modules only, so that every one can read artefacts.
"""
