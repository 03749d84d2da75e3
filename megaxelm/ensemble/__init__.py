"""Routers, mixture of the experts' probabilities, scoring, generation, and the ensemble folder."""
