"""One thin module a verb; heavy imports only inside the verb that needs them."""
