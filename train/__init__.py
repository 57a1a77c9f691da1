"""From images to a trained teacher and student. Needs torch and timm; imports no other room."""
