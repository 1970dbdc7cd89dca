"""The page of the metric's Space: answers and labels are typed in as JSON."""

import json

import evaluate
import gradio as gr


metric = evaluate.load("au_intensity.py")


def scores(predictions: str, references: str) -> dict:
    """What the metric makes of two arrays in JSON, one row a sample and one column a unit; NaN where unknown."""
    return metric.compute(predictions=json.loads(predictions), references=json.loads(references))


gr.Interface(
    scores,
    [gr.Textbox("[[1, 0], [0, 1]]", label="Predictions"), gr.Textbox("[[1, NaN], [1, 1]]", label="References")],
    gr.JSON(label="Scores"),
    title=metric.name,
    description=metric.description,
    analytics_enabled=False,
).launch(show_error=True)
