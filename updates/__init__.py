"""Updates of a bundle on a device: packs, their signatures, and the store that keeps several versions of a bundle."""
