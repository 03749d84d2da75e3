"""One model from the experts of a run: parameters averaged, a mixture-of-experts model, or a dense model distilled; and their ladder."""
