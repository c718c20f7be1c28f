"""The shop's routes."""

from django.urls import path

from . import views

urlpatterns = [
    path("", views.home, name="home"),
    path("products/", views.product_list, name="products"),
    path("products/<int:pk>/", views.product_detail, name="product"),
    path("orders/<int:pk>/", views.order_detail, name="order"),
    path("reports/sales/", views.sales_report, name="sales"),
    path("search/", views.search, name="search"),
    path("healthz", views.healthz, name="healthz"),
]
