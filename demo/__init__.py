"""A Gradio demo of a trained model."""
