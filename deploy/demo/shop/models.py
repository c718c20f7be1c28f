"""What the shop sells, to whom, and what was ordered. Money is in cents, so that sums are exact everywhere."""

from django.db import models
from django.urls import reverse


class Customer(models.Model):
    name = models.CharField(max_length=80)
    email = models.EmailField(unique=True)
    city = models.CharField(max_length=40, db_index=True)

    def __str__(self):
        return self.name


class Product(models.Model):
    sku = models.CharField(max_length=16, unique=True)
    name = models.CharField(max_length=80)
    category = models.CharField(max_length=30, db_index=True)
    description = models.TextField()
    price_cents = models.PositiveIntegerField()
    stock = models.PositiveIntegerField()

    def __str__(self):
        return self.name

    def get_absolute_url(self):
        return reverse("product", args=[self.pk])

    @property
    def availability(self):
        if self.stock == 0:
            return "sold out"
        return "few left" if self.stock < 10 else "in stock"


class Order(models.Model):
    customer = models.ForeignKey(Customer, on_delete=models.CASCADE, related_name="orders")
    placed = models.DateTimeField(db_index=True)
    status = models.CharField(max_length=12, default="paid")

    def __str__(self):
        return f"order {self.pk}"

    def get_absolute_url(self):
        return reverse("order", args=[self.pk])


class OrderLine(models.Model):
    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="lines")
    product = models.ForeignKey(Product, on_delete=models.PROTECT, related_name="lines")
    quantity = models.PositiveIntegerField()
    # The price at the time of the order: the product's may have changed since.
    unit_price_cents = models.PositiveIntegerField()

    @property
    def total_cents(self):
        return self.quantity * self.unit_price_cents
