"""The shop's pages: some light, one slow by mistake (an N+1 query), one slow by design (a report)."""

from django.db.models import Count, F, Sum
from django.http import HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, render

from . import reports, searching
from .models import Order, OrderLine, Product


def home(request):
    return render(
        request,
        "shop/home.html",
        {
            "newest": Product.objects.order_by("-pk")[:6],
            "categories": Product.objects.values("category").annotate(products=Count("pk")).order_by("category"),
        },
    )


def product_list(request):
    products = Product.objects.order_by("name")
    category = request.GET.get("category")
    if category:
        products = products.filter(category=category)
    return render(request, "shop/product_list.html", {"products": products[:60], "category": category})


def product_detail(request, pk):
    product = get_object_or_404(Product, pk=pk)
    sold = product.lines.aggregate(pieces=Sum("quantity"))["pieces"] or 0
    similar = Product.objects.filter(category=product.category).exclude(pk=pk).order_by("price_cents")[:5]
    return render(request, "shop/product_detail.html", {"product": product, "sold": sold, "similar": similar})


def order_detail(request, pk):
    """On purpose without `select_related`: the template asks for each line's product, one query at a time."""
    order = get_object_or_404(Order, pk=pk)
    lines = list(order.lines.order_by("pk"))
    return render(
        request,
        "shop/order_detail.html",
        {"order": order, "lines": lines, "total_cents": sum(line.total_cents for line in lines)},
    )


def sales_report(request):
    by_category = (
        OrderLine.objects.values("product__category")
        .annotate(pieces=Sum("quantity"), cents=Sum(F("quantity") * F("unit_price_cents")))
        .order_by("-cents")
    )
    months = reports.monthly_sales(OrderLine.objects.values_list("order__placed", "quantity", "unit_price_cents"))
    return render(
        request,
        "shop/sales_report.html",
        {"by_category": by_category, "months": months, "trend": reports.trend(months)},
    )


def search(request):
    words = request.GET.get("q", "")
    hits = searching.find(words, Product.objects.order_by("pk").values("pk", "name", "category", "description"))
    return JsonResponse({"query": words, "count": len(hits), "hits": hits})


def healthz(request):
    return HttpResponse("ok\n", content_type="text/plain")
