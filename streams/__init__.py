"""Pictures as they come: from a camera, a video, a stream of the network, or a folder that is being filled.

A thread decodes while the student computes. opencv decodes all but folders: extra `watch`, imported when it is needed.
"""
