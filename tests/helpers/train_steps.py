"""User-defined train steps that never call Keras's, written as in Keras's guides."""

import types

import keras

import kerasmp as mp

BACKEND = keras.backend.backend()


def _updated_metrics(model, loss, y, y_pred):
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(loss)
        else:
            metric.update_state(y, y_pred)
    return {metric.name: metric.result() for metric in model.metrics}


class TensorFlowStep:
    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return _updated_metrics(self, loss, y, y_pred)


class TorchStep:
    def train_step(self, data):
        import torch

        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        self.optimizer.scale_loss(loss).backward()
        gradients = [v.value.grad for v in self.trainable_variables]
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_variables)
        return _updated_metrics(self, loss.detach(), y, y_pred.detach())


class JaxStep:
    def train_step(self, state, data):
        import jax

        trainable, others, of_optimizer, of_metrics = state
        x, y = data

        def scaled_loss(trainable, others):
            y_pred, others = self.stateless_call(trainable, others, x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
            mapping = list(zip(self.optimizer.variables, of_optimizer, strict=True))
            with keras.StatelessScope(mapping):
                scaled = self.optimizer.scale_loss(loss)
            return scaled, (loss, y_pred, others)

        gradient = jax.value_and_grad(scaled_loss, has_aux=True)
        (_, (loss, y_pred, others)), gradients = gradient(trainable, others)
        trainable, of_optimizer = self.optimizer.stateless_apply(of_optimizer, gradients, trainable)
        mapping = list(zip(self.metrics_variables, of_metrics, strict=True))
        with keras.StatelessScope(mapping) as scope:
            logs = _updated_metrics(self, loss, y, y_pred)
        of_metrics = [scope.get_current_value(v) for v in self.metrics_variables]
        return logs, (trainable, others, of_optimizer, of_metrics)


OwnStep = {"tensorflow": TensorFlowStep, "jax": JaxStep, "torch": TorchStep}[BACKEND]


class WithOwnStep(OwnStep, mp.Sequential):
    pass


# To be used instead of kerasmp where a network is built from the classes of a module.
MODULE = types.SimpleNamespace(Sequential=WithOwnStep)


class _Bare:
    """A step without loss scaling, as in Keras's guides; `to_differentiate` may add it."""

    def to_differentiate(self, loss):
        return loss


class BareTensorFlowStep(_Bare):
    def train_step(self, data):
        loss, gradients = self.loss_and_gradients(*data)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}

    def loss_and_gradients(self, x, y):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            scaled = self.to_differentiate(loss)
        return loss, tape.gradient(scaled, self.trainable_variables)


class BareTorchStep(_Bare):
    def train_step(self, data):
        loss, gradients = self.loss_and_gradients(*data)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}

    def loss_and_gradients(self, x, y):
        self.zero_grad()
        loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        self.to_differentiate(loss).backward()
        return loss.detach(), [v.value.grad for v in self.trainable_variables]


class BareJaxStep(_Bare):
    def train_step(self, state, data):
        trainable, others, of_optimizer, of_metrics = state
        loss, gradients = self.loss_and_gradients(trainable, others, of_optimizer, *data)
        trainable, of_optimizer = self.optimizer.stateless_apply(of_optimizer, gradients, trainable)
        return {"loss": loss}, (trainable, others, of_optimizer, of_metrics)

    def loss_and_gradients(self, trainable, others, of_optimizer, x, y):
        import jax

        def scaled_loss(trainable):
            y_pred, _ = self.stateless_call(trainable, others, x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
            mapping = list(zip(self.optimizer.variables, of_optimizer, strict=True))
            with keras.StatelessScope(mapping):
                return self.to_differentiate(loss), loss

        (_, loss), gradients = jax.value_and_grad(scaled_loss, has_aux=True)(trainable)
        return loss, gradients


BareStep = {"tensorflow": BareTensorFlowStep, "jax": BareJaxStep, "torch": BareTorchStep}[BACKEND]
