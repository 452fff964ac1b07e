"""How likely is this image: flow priors, exact likelihoods, anomaly scores."""
