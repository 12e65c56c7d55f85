"""What a function multiplies, counted in its traced program."""

import jax
import numpy as np


def products(function, *x):
    """Multiply-adds times two of all matrix products, from the shapes in the traced program."""

    def inner(equation):
        values = [v if isinstance(v, (tuple, list)) else (v,) for v in equation.params.values()]
        return [j for j in (getattr(j, "jaxpr", j) for v in values for j in v) if hasattr(j, "eqns")]

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            name, within = equation.primitive.name, inner(equation)
            if name == "dot_general":
                (over, _), _ = equation.params["dimension_numbers"]
                contracted = np.prod([equation.invars[0].aval.shape[i] for i in over], dtype=int)
                total += 2 * contracted * equation.outvars[0].aval.size
            elif name == "pallas_call":
                return np.inf
            elif name == "cond":
                # Of a choice by platform the branch without a kernel, and of one by the mask the last, which gathers.
                total += [branch for branch in map(count, within) if branch < np.inf][-1]
            else:
                total += (equation.params["length"] if name == "scan" else 1) * sum(map(count, within))
        return total

    return count(jax.make_jaxpr(function)(*x).jaxpr)
